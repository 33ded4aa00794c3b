/**
 * Reads the server's side of the transmission phase: reply headers, chunks, payloads, in any order and cut anywhere.
 * No sockets: bytes in, settled requests out. Source: proto.md, "Simple reply message", "Structured reply types"; of the branch
 * extension-ext-header "Extended reply chunk message".
 *
 * Invariants:
 * - The input belongs to the caller and is reused: payloads are copied straight into the buffer of their request, anything
 *   else that is cut by the end of the input waits in `#scratch`.
 * - A byte of a request's buffer is written only after its place was checked against the request and against what is
 *   covered already. A read succeeds only when every byte of it was covered exactly once.
 * - Whatever the protocol forbids throws BlockferryError 'protocol'. The connection is of no use then, and neither is this.
 */

import { displayable, protocolError } from '../codec/client.js';
import {
  ChunkFlag,
  ChunkType,
  Command,
  CommandFlag,
  Errno,
  EXTENDED_REPLY_HEADER_BYTES,
  EXTENDED_REPLY_MAGIC,
  SIMPLE_REPLY_HEADER_BYTES,
  SIMPLE_REPLY_MAGIC,
  STRING_BYTES_MAX,
  STRUCTURED_REPLY_MAGIC,
} from '../constants.js';
import type { PendingRequest, RequestTable } from './requests.js';
import { StatusReader, type StatusReaderOptions } from './status-reader.js';

/** Longest error chunk that is read, bytes: the longest message, and room for fields of types to come. */
export const ERROR_CHUNK_BYTES_MAX = STRING_BYTES_MAX + 1024;
/** Most extents in one chunk (proto.md: SHOULD NOT exceed 2^20). */
export const EXTENTS_MAX = 1 << 20;
/** Separate pieces all unfinished reads of one connection may have between their gaps. */
export const FRAGMENTS_MAX = 1 << 18;

const U32 = 0x1_0000_0000;
const ERROR_BIT = 0x8000;

/** What the next bytes are. All but `Data` and `Skip` are units of fixed length that are parsed in one go. */
const Expect = {
  Header: 0,
  ChunkLength: 1,
  DataOffset: 2,
  Data: 3,
  Hole: 4,
  StatusContext: 5,
  StatusExtent: 6,
  ErrorHead: 7,
  ErrorBody: 8,
  Skip: 9,
} as const;
type Expect = (typeof Expect)[keyof typeof Expect];

export interface ReplyReaderOptions extends StatusReaderOptions {
  /** Structured replies, or extended headers, were agreed on. */
  readonly structured: boolean;
  /** Extended headers were agreed on. Default: false. */
  readonly extended?: boolean;
}

export class ReplyReader {
  #expect: Expect = Expect.Header;
  readonly #extended: boolean;
  readonly #headerBytes: number;
  readonly #extentBytes: number;
  readonly #status: StatusReader;
  /** Bytes of the unit that comes next. */
  #need: number;
  readonly #scratch = Buffer.alloc(STRING_BYTES_MAX + 64);
  #scratchFill = 0;

  /** The request whose reply is being read, null between replies. */
  #request: PendingRequest | null = null;
  #chunkType = 0;
  #chunkDone = false;
  /** Bytes of the chunk, or of the simple reply's payload, that were not consumed yet. */
  #remaining = 0;
  /** Where in the request's buffer the next payload byte goes. */
  #destination = 0;

  #messageLength = 0;

  constructor(
    readonly table: RequestTable,
    readonly options: ReplyReaderOptions,
  ) {
    this.#extended = options.extended ?? false;
    this.#headerBytes = this.#extended ? EXTENDED_REPLY_HEADER_BYTES : SIMPLE_REPLY_HEADER_BYTES;
    this.#extentBytes = this.#extended ? 16 : 8;
    this.#need = this.#headerBytes;
    this.#status = new StatusReader(options);
  }

  /** Takes input[0, length). */
  receive(input: Buffer, length: number): void {
    let at = 0;
    while (at < length) {
      if (this.#expect === Expect.Data || this.#expect === Expect.Skip) {
        at += this.#consume(input, at, Math.min(this.#remaining, length - at));
      } else if (this.#scratchFill === 0 && length - at >= this.#need) {
        const need = this.#need;
        this.#unit(input, at);
        at += need;
      } else {
        const part = Math.min(this.#need - this.#scratchFill, length - at);
        input.copy(this.#scratch, this.#scratchFill, at, at + part);
        this.#scratchFill += part;
        at += part;
        if (this.#scratchFill === this.#need) {
          this.#scratchFill = 0;
          this.#unit(this.#scratch, 0);
        }
      }
    }
  }

  #consume(input: Buffer, at: number, length: number): number {
    if (this.#expect === Expect.Data) {
      input.copy((this.#request as PendingRequest).buffer as Buffer, this.#destination, at, at + length);
      this.#destination += length;
    }
    this.#remaining -= length;
    if (this.#remaining === 0) this.#chunkEnded();
    return length;
  }

  /** Parses the unit of `#need` bytes at `at`, and says what comes next. */
  #unit(bytes: Buffer, at: number): void {
    switch (this.#expect) {
      case Expect.Header:
        if (this.#extended) this.#extendedHeader(bytes, at);
        else this.#header(bytes, at);
        break;
      case Expect.ChunkLength:
        this.#chunkLength(bytes.readUInt32BE(at));
        break;
      case Expect.DataOffset:
        this.#dataOffset(read64(bytes, at));
        break;
      case Expect.Hole:
        this.#hole(read64(bytes, at), bytes.readUInt32BE(at + 8));
        break;
      case Expect.StatusContext:
        this.#statusContext(bytes.readUInt32BE(at), this.#extended ? bytes.readUInt32BE(at + 4) : null);
        break;
      case Expect.StatusExtent:
        if (this.#extended) this.#statusExtent(read64(bytes, at), read64(bytes, at + 8));
        else this.#statusExtent(bytes.readUInt32BE(at), bytes.readUInt32BE(at + 4));
        break;
      case Expect.ErrorHead:
        this.#errorHead(bytes.readUInt32BE(at), bytes.readUInt16BE(at + 4));
        break;
      case Expect.ErrorBody:
        this.#errorBody(bytes, at);
        break;
    }
  }

  #next(expect: Expect, need: number): void {
    this.#expect = expect;
    this.#need = need;
  }

  /** 16 bytes: a whole simple reply header, or a chunk header without its length. */
  #header(bytes: Buffer, at: number): void {
    const magic = bytes.readUInt32BE(at);
    const request = this.table.find(bytes.readUInt32BE(at + 8), bytes.readUInt32BE(at + 12));
    if (magic === SIMPLE_REPLY_MAGIC) {
      this.#simpleReply(known(request), bytes.readUInt32BE(at + 4));
    } else if (magic === STRUCTURED_REPLY_MAGIC) {
      if (!this.options.structured) throw protocolError('a structured reply that was not agreed on');
      this.#request = known(request);
      this.#request.begun = true;
      this.#chunkDone = (bytes.readUInt16BE(at + 4) & ChunkFlag.DONE) !== 0;
      this.#chunkType = bytes.readUInt16BE(at + 6);
      this.#next(Expect.ChunkLength, 4);
    } else {
      throw protocolError(`a reply with the magic 0x${magic.toString(16)}`);
    }
  }

  #extendedHeader(bytes: Buffer, at: number): void {
    const magic = bytes.readUInt32BE(at);
    if (magic !== EXTENDED_REPLY_MAGIC)
      throw protocolError(`a reply with the magic 0x${magic.toString(16)} despite extended headers`);
    const request = known(this.table.find(bytes.readUInt32BE(at + 8), bytes.readUInt32BE(at + 12)));
    if (read64(bytes, at + 16) !== request.offset)
      throw protocolError(`a reply that repeats another offset than that of ${request.describe()}`);
    this.#request = request;
    request.begun = true;
    this.#chunkDone = (bytes.readUInt16BE(at + 4) & ChunkFlag.DONE) !== 0;
    this.#chunkType = bytes.readUInt16BE(at + 6);
    this.#chunkLength(read64(bytes, at + 24));
  }

  #simpleReply(request: PendingRequest, errno: number): void {
    if (request.begun) throw protocolError(`a simple reply after chunks, to ${request.describe()}`);
    const reads = request.command === Command.READ;
    if (reads && this.options.structured)
      throw protocolError('a simple reply to READ despite structured replies');
    if (errno !== Errno.OK) {
      request.errno = errno;
      this.table.settle(request, null);
    } else if (reads) {
      request.begun = true;
      this.#request = request;
      this.#chunkDone = true;
      this.#cover(request, request.offset, request.length);
      this.#expectData(request.at, request.length);
    } else if (request.command === Command.BLOCK_STATUS) {
      throw protocolError('a simple reply without the block status asked for');
    } else {
      this.table.settle(request, null);
    }
  }

  #chunkLength(length: number): void {
    const request = this.#request as PendingRequest;
    this.#remaining = length;
    switch (this.#chunkType) {
      case ChunkType.NONE:
        if (length !== 0 || !this.#chunkDone)
          throw protocolError('an empty chunk with data, or that is not the last');
        this.#chunkEnded();
        return;
      case ChunkType.OFFSET_DATA:
        if (request.command !== Command.READ || length < 9 || length - 8 > request.length) break;
        this.#next(Expect.DataOffset, 8);
        return;
      case ChunkType.OFFSET_HOLE:
        if (request.command !== Command.READ || length !== 12) break;
        this.#next(Expect.Hole, 12);
        return;
      case this.#extended ? ChunkType.BLOCK_STATUS_EXT : ChunkType.BLOCK_STATUS: {
        const head = this.#extentBytes / 2;
        const extents = (length - head) / this.#extentBytes;
        if (request.command !== Command.BLOCK_STATUS || !Number.isInteger(extents)) break;
        if (extents < 1 || extents > EXTENTS_MAX) break;
        this.#next(Expect.StatusContext, head);
        return;
      }
      default:
        if ((this.#chunkType & ERROR_BIT) === 0) break;
        if (length < (this.#chunkType === ChunkType.ERROR_OFFSET ? 14 : 6) || length > ERROR_CHUNK_BYTES_MAX)
          break;
        this.#next(Expect.ErrorHead, 6);
        return;
    }
    throw protocolError(
      `a chunk of type ${this.#chunkType} and ${length} bytes in the reply to ${request.describe()}`,
    );
  }

  #dataOffset(offset: number): void {
    const request = this.#request as PendingRequest;
    this.#remaining -= 8;
    this.#cover(request, offset, this.#remaining);
    this.#expectData(request.at + (offset - request.offset), this.#remaining);
  }

  #expectData(destination: number, length: number): void {
    this.#destination = destination;
    this.#remaining = length;
    this.#next(Expect.Data, 0);
  }

  #hole(offset: number, length: number): void {
    const request = this.#request as PendingRequest;
    if (length === 0) throw protocolError('a hole of no bytes');
    this.#cover(request, offset, length);
    const start = request.at + (offset - request.offset);
    (request.buffer as Buffer).fill(0, start, start + length);
    this.#chunkEnded();
  }

  /** Notes that [offset, offset + length) of a read arrives, after checking that it may. */
  #cover(request: PendingRequest, offset: number, length: number): void {
    if (offset < request.offset || offset + length > request.offset + request.length) {
      throw protocolError(`${length} bytes at ${offset} in the reply to ${request.describe()}`);
    }
    if (request.hasContent && (request.flags & CommandFlag.DF) !== 0)
      throw protocolError(`several pieces in the reply to ${request.describe()}, which was to be whole`);
    request.hasContent = true;
    const before = request.coverage.fragments;
    if (!request.coverage.add(offset, offset + length)) {
      throw protocolError(`bytes at ${offset} come twice in the reply to ${request.describe()}`);
    }
    this.table.fragments += request.coverage.fragments - before;
    if (this.table.fragments > FRAGMENTS_MAX) throw protocolError('replies in too many pieces');
  }

  /** `count`: how many extents the chunk says it has, if it says. */
  #statusContext(contextId: number, count: number | null): void {
    this.#remaining -= this.#need;
    const extents = this.#remaining / this.#extentBytes;
    if (count !== null && count !== extents)
      throw protocolError(`a count of ${count} extents, in ${this.#remaining} bytes`);
    this.#status.begin(this.#request as PendingRequest, contextId, extents);
    this.#next(Expect.StatusExtent, this.#extentBytes);
  }

  #statusExtent(length: number, status: number): void {
    this.#status.extent(this.#request as PendingRequest, length, status);
    this.#remaining -= this.#extentBytes;
    if (this.#remaining === 0) this.#chunkEnded();
  }

  #errorHead(errno: number, messageLength: number): void {
    const fixed = this.#chunkType === ChunkType.ERROR_OFFSET ? 14 : 6;
    if (errno === Errno.OK) throw protocolError('an error chunk without an error');
    if (messageLength > STRING_BYTES_MAX || messageLength > this.#remaining - fixed) {
      throw protocolError(`an error message of ${messageLength} bytes in a chunk of ${this.#remaining}`);
    }
    const request = this.#request as PendingRequest;
    if (request.errno === Errno.OK) request.errno = errno;
    this.#messageLength = messageLength;
    this.#remaining -= 6;
    const body = messageLength + (fixed - 6);
    if (body > 0) this.#next(Expect.ErrorBody, body);
    else this.#skip();
  }

  #errorBody(bytes: Buffer, at: number): void {
    const request = this.#request as PendingRequest;
    if (request.errorMessage === '') {
      request.errorMessage = displayable(bytes.toString('utf8', at, at + this.#messageLength));
    }
    if (this.#chunkType === ChunkType.ERROR_OFFSET) {
      const offset = read64(bytes, at + this.#messageLength);
      if (offset < request.offset || offset >= request.offset + request.length) {
        throw protocolError(`an error at ${offset} in the reply to ${request.describe()}`);
      }
    }
    this.#remaining -= this.#need;
    this.#skip();
  }

  /** Error chunks may carry fields behind those that are known. */
  #skip(): void {
    if (this.#remaining === 0) this.#chunkEnded();
    else this.#next(Expect.Skip, 0);
  }

  #chunkEnded(): void {
    const request = this.#request as PendingRequest;
    this.#request = null;
    this.#next(Expect.Header, this.#headerBytes);
    if (!this.#chunkDone) return;
    if (request.errno === Errno.OK) {
      if (
        request.command === Command.READ &&
        !request.coverage.isExactly(request.offset, request.offset + request.length)
      ) {
        throw protocolError(`the reply to ${request.describe()} ended before all its bytes came`);
      }
      if (request.command === Command.BLOCK_STATUS && !this.#status.isComplete(request)) {
        throw protocolError(`the reply to ${request.describe()} ended before all contexts answered`);
      }
    }
    this.table.settle(request, null);
  }
}

function known(request: PendingRequest | null): PendingRequest {
  if (request === null) throw protocolError('a reply to no request of ours (wrong cookie)');
  return request;
}

/** 64 bits as a number: exact below 2^53, rounded beyond. */
function read64(bytes: Buffer, at: number): number {
  return bytes.readUInt32BE(at) * U32 + bytes.readUInt32BE(at + 4);
}
