/**
 * The package's entry `blockferry/nbd`: an NBD client and server to embed. docs/library.md shows it at work.
 *
 * What is exported here is what the package promises; the rest of it may change at any time and cannot be imported. Importing it loads no
 * native code: NbdServer.listen and openFile do, the client never.
 */

export { BlockferryError, type ErrorCode } from '../errors.js';
export {
  type ExportInfo,
  type Extent,
  type ListedExport,
  NbdClient,
  NbdReplyError,
} from '../nbd/client/client.js';
export type { ConnectLimits } from '../nbd/client/connect.js';
export type { NbdClientOptions, ReadOptions, WriteOptions, ZeroOptions } from '../nbd/client/options.js';
export type { BlockSize } from '../nbd/codec/client.js';
export {
  ALLOCATION_DEPTH,
  Allocation,
  BASE_ALLOCATION,
  CommandFlag,
  Errno,
  TransmissionFlag,
} from '../nbd/constants.js';
export { type BlockDevice, type IoRequest, LATER, type StatusRequest } from '../nbd/device.js';
export type { ClientTlsSettings, ServerTlsSettings } from '../nbd/tls.js';
export { formatNbdUri, type NbdAddress, type NbdUri, parseNbdUri } from '../nbd/uri.js';
export { createDevice, type DeviceFunctions, type Done } from './device.js';
export { type FileDevice, type FileOptions, openFile } from './file.js';
export { type NbdExport, NbdServer, type NbdServerOptions } from './server.js';
