/** Opens raw images for the server. Native code is loaded when the first one is opened, not before. */

import type { BlockDevice } from '../nbd/device.js';

/** How to open a file. */
export interface FileOptions {
  /** Clients may not write, and several readers may have the file open. Default: false. */
  readonly readOnly?: boolean;
}

/**
 * A raw image file or block device. Reports its holes (`base:allocation`), and all of it as local (`qemu:allocation-depth`);
 * TRIM and WRITE_ZEROES punch holes where the file system can.
 */
export interface FileDevice extends BlockDevice {
  /** Of the file, absolute, with links resolved. */
  readonly path: string;
  /**
   * Waits for what is under way, makes all that was written durable and lets go of the file. Close the server first: sessions that are
   * left get ESHUTDOWN. Rejects with 'image-io' when the file could not be synced. May be called again.
   */
  close(): Promise<void>;
}

/**
 * Opens a raw image file or block device, which must exist and not be empty, and locks it: one writer, or any number of readers. Rejects
 * with 'image-missing', 'image-in-use', 'image-io', or 'not-found' when the native addon was not built.
 */
export async function openFile(path: string, options: FileOptions = {}): Promise<FileDevice> {
  const { ImageDevice } = await import('./image-device.js');
  return new ImageDevice(path, options.readOnly ?? false);
}
