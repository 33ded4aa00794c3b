/**
 * What BLOCK_STATUS chunks say, checked against the request and the agreed contexts as it comes. ReplyReader hands it the fields.
 * Source: proto.md, "Structured reply types", NBD_REPLY_TYPE_BLOCK_STATUS; of the branch extension-ext-header
 * NBD_REPLY_TYPE_BLOCK_STATUS_EXT.
 *
 * Invariants: of the contexts that answer only the one that was asked for leaves extents in the request. They begin at the request's
 * offset, follow one another, and end inside the export.
 */

import { protocolError } from '../codec/client.js';
import { CommandFlag } from '../constants.js';
import type { Extent, PendingRequest } from './requests.js';

const U32_MAX = 0xffff_ffff;

export interface StatusReaderOptions {
  /** Ids of the agreed metadata contexts. */
  readonly contextIds: ReadonlySet<number>;
  /** Those of them whose status has 32 bits at most. Default: none is known to. */
  readonly narrowContextIds?: ReadonlySet<number>;
  /** Size of the export, bytes. */
  readonly size: number;
}

export class StatusReader {
  /** The chunk's context is the one that was asked for. */
  #wanted = false;
  #narrow = false;
  /** Bytes its extents describe so far. */
  #describedBytes = 0;

  constructor(readonly options: StatusReaderOptions) {}

  /** A chunk begins that has `extents` extents. */
  begin(request: PendingRequest, contextId: number, extents: number): void {
    if (!this.options.contextIds.has(contextId))
      throw protocolError(`block status of the unknown context ${contextId}`);
    request.contextsAnswered ??= new Set();
    if (request.contextsAnswered.has(contextId))
      throw protocolError(`the context ${contextId} answers twice`);
    request.contextsAnswered.add(contextId);
    this.#wanted = contextId === request.contextId;
    this.#narrow = this.options.narrowContextIds?.has(contextId) ?? false;
    if (this.#wanted) request.extents = [];
    this.#describedBytes = 0;
    if (request.filtered && !this.#wanted)
      throw protocolError(`block status of the context ${contextId}, which was not asked for`);
    if (extents !== 1 && (request.flags & CommandFlag.REQ_ONE) !== 0)
      throw protocolError('several extents where one was asked for');
  }

  /** The chunk's next extent. `status` is rounded beyond 2^53. */
  extent(request: PendingRequest, length: number, status: number): void {
    if (status > (this.#narrow ? U32_MAX : Number.MAX_SAFE_INTEGER))
      throw protocolError(`a status beyond ${this.#narrow ? 32 : 53} bits`);
    if (length === 0) throw protocolError('an extent of no bytes');
    if (this.#describedBytes >= request.length) throw protocolError('extents beyond what was asked for');
    if ((request.flags & CommandFlag.REQ_ONE) !== 0 && length > request.length)
      throw protocolError('an extent longer than what was asked for');
    // The last extent may reach beyond the request, but nothing lies beyond the export.
    const shown = Math.min(length, this.options.size - request.offset - this.#describedBytes);
    this.#describedBytes += length;
    if (this.#wanted) addExtent(request.extents as Extent[], shown, status);
  }

  /** Every context that the request asks about has answered. */
  isComplete(request: PendingRequest): boolean {
    return request.contextsAnswered?.size === (request.filtered ? 1 : this.options.contextIds.size);
  }
}

function addExtent(extents: Extent[], length: number, flags: number): void {
  const last = extents.at(-1);
  if (last !== undefined && last.flags === flags) {
    extents[extents.length - 1] = { length: last.length + length, flags };
  } else {
    extents.push({ length, flags });
  }
}
