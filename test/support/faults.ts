/** How a test's data thread is told to fail. */

export const FAULTS = 'blockferry-test-faults';

/** For the thread on which the volume with this image is. */
export interface Fault {
  image: string;
  /** throw: an exception nobody catches. memory: the heap overflows. exit: it just ends. at-cancel: at the end of a cancel, before its answer. */
  how: 'throw' | 'memory' | 'exit' | 'at-cancel';
}
