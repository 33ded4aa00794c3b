/** What a handshake needs and what comes of it. */
import type { CompressionLevel } from '../codec/frames.js';
import type { BlockDevice } from '../device.js';
import type { TlsMode } from '../tls.js';
import type { SelectedContext } from './contexts.js';
import type { ExportDirectory, ExportEntry } from './exports.js';

export type EndReason =
  | 'abort' // the client took its leave
  | 'client-flags' // the client set flags we do not know
  | 'option-magic' // what should be an option is not
  | 'option-too-long' // more data than OPTION_SKIP_BYTES_MAX
  | 'too-many-options'
  | 'export-name' // EXPORT_NAME cannot be met, and has no way to say so
  | 'tls-required' // EXPORT_NAME, which has no way to say so either
  | 'connections-max' // EXPORT_NAME of an export that has all the clients it may have
  | 'shutting-down'; // EXPORT_NAME came too late

/** What is still true in the handshake that goes on behind the option COMPRESSION. */
export interface BehindCompression {
  noZeroes: boolean;
  secure: boolean;
}

export type HandshakeResult =
  | {
      kind: 'transmission';
      entry: ExportEntry;
      /** Open; whoever takes the result releases it. */
      device: BlockDevice;
      /** Structured replies were agreed on. */
      structured: boolean;
      /** Extended headers were agreed on; then `structured` is true as well. */
      extended: boolean;
      /** Metadata contexts the client selected; without `structured` none. */
      contexts: readonly SelectedContext[];
      /** NO_ZEROES was agreed on. */
      noZeroes: boolean;
      /** Bytes that arrived behind the handshake: the beginning of transmission. */
      rest: Buffer;
    }
  /** The client was told to begin with TLS. `behindTls` is for the handshake that follows. */
  | { kind: 'starttls'; behindTls: { noZeroes: boolean } }
  /** Both directions are compressed from here on. `rest`: what came behind the option, in frames already. */
  | { kind: 'compression'; level: CompressionLevel; behindCompression: BehindCompression; rest: Buffer }
  | { kind: 'end'; reason: EndReason; detail: string };

export interface HandshakeParameters {
  exports: ExportDirectory;
  /** Default: 'off'. */
  tls?: TlsMode;
  /** This is the handshake that goes on behind STARTTLS, with what is still true of the one before. */
  behindTls?: { noZeroes: boolean };
  /** Default: false. True: the option COMPRESSION is known here. */
  compression?: boolean;
  /** Likewise, behind that option. */
  behindCompression?: BehindCompression;
  /** Takes what is to be sent; the buffer is the receiver's. */
  send(bytes: Buffer): void;
  /** Default: true. LIST is answered ERR_POLICY otherwise; who knows a name may use it. */
  listExports?: boolean;
  /** Why no more clients can be served an export now, in words for the client. */
  refusal?(entry: ExportEntry): string | undefined;
  /** Told of an export that a client chose and that could not be opened. The client only learns that it is not available. */
  openFailed?(entry: ExportEntry, error: unknown): void;
}

/** The end of a handshake that leads nowhere. */
export function end(reason: EndReason, detail: string): HandshakeResult {
  return { kind: 'end', reason, detail };
}
