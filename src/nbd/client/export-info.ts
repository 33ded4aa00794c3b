/** What a server tells about an export during the handshake, gathered reply by reply. */

import {
  type BlockSize,
  decodeInfo,
  decodeMetaContext,
  displayable,
  type ExportBasics,
  protocolError,
} from '../codec/client.js';
import { type ReplyForm, TransmissionFlag } from '../constants.js';

/** What the server told about the export. */
export interface ExportInfo {
  /** As it was asked for. */
  readonly exportName: string;
  /** Bytes, 0..2^53-1. */
  readonly size: number;
  /** TransmissionFlag bits. */
  readonly flags: number;
  readonly readOnly: boolean;
  /** Structured replies, or extended headers, were agreed on. */
  readonly structured: boolean;
  /** Extended headers were agreed on: requests without payload may be longer than 4 GiB. */
  readonly extended: boolean;
  /** Metadata contexts the server agreed to report, with their ids. */
  readonly contexts: ReadonlyMap<string, number>;
  /** Empty when the server gave none. */
  readonly description: string;
  /** The server's own name of the export, if it gave one. */
  readonly name: string | null;
  /** Null: nothing was advertised, the protocol's defaults hold (1, 4096, 32 MiB). */
  readonly blockSize: BlockSize | null;
}

export class ExportFacts {
  basics: ExportBasics | null = null;
  readonly #contexts = new Map<string, number>();
  #name: string | null = null;
  #description = '';
  #blockSize: BlockSize | null = null;

  /** Payload of a REP_META_CONTEXT, in answer to `queries`. */
  addContext(payload: Buffer, queries: readonly string[]): void {
    const { id, name } = decodeMetaContext(payload);
    if (!queries.includes(name)) {
      throw protocolError(`the metadata context '${displayable(name)}' was not asked for`);
    }
    if (this.#contexts.has(name)) throw protocolError(`the metadata context '${name}' comes twice`);
    for (const known of this.#contexts.values()) {
      if (known === id) throw protocolError(`two metadata contexts have the id ${id}`);
    }
    this.#contexts.set(name, id);
  }

  forgetContexts(): void {
    this.#contexts.clear();
  }

  /** Payload of a REP_INFO. */
  addInfo(payload: Buffer): void {
    const item = decodeInfo(payload);
    switch (item.kind) {
      case 'export':
        if (this.basics !== null) throw protocolError('INFO_EXPORT comes twice');
        this.basics = { size: item.size, flags: item.flags };
        break;
      case 'name':
        this.#name = item.name;
        break;
      case 'description':
        this.#description = item.description;
        break;
      case 'block-size':
        this.#blockSize = item.blockSize;
        break;
      case 'unknown':
        break;
    }
  }

  info(exportName: string, form: ReplyForm): ExportInfo {
    if (this.basics === null) throw protocolError('GO was acknowledged without INFO_EXPORT');
    const { size, flags } = this.basics;
    return {
      exportName,
      size,
      flags,
      readOnly: (flags & TransmissionFlag.READ_ONLY) !== 0,
      structured: form !== 'simple',
      extended: form === 'extended',
      contexts: this.#contexts,
      description: this.#description,
      name: this.#name,
      blockSize: this.#blockSize,
    };
  }
}
