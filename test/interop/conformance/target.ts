/** The server under test: where it is, and what it offers, found out by asking. */
import { Info, Option, OptionReply } from '../../../src/nbd/constants.js';
import { type NbdAddress, type NbdUri, parseNbdUri } from '../../../src/nbd/uri.js';
import { infoData, metaData } from '../../support/handshake.js';
import { contextsOf, type ExportFacts, factsOf, Haggle, nameOf } from './haggle.js';
import { Wire } from './wire.js';

export interface Target {
  readonly uri: string;
  readonly address: NbdAddress;
  readonly exportName: string;
  /** As told to a client with structured replies, if the server has them. */
  readonly facts: ExportFacts;
  readonly structured: boolean;
  readonly extended: boolean;
  /** A name it does not know is refused. */
  readonly refusesNames: boolean;
  /** LIST is not refused. */
  readonly lists: boolean;
  /** Metadata contexts the server lists. */
  readonly contexts: readonly string[];
  readonly readOnlyAddress: NbdAddress | null;
  readonly readOnlyName: string;
  /** A server that takes STARTTLS: the same one, or another of the same make. */
  readonly tls: (NbdUri & { readonly certificates: string | null }) | null;
}

/** Tells servers that know their exports from those that serve one under any name. */
export const UNKNOWN_NAME = 'no such export here';

export interface TargetUris {
  uri: string;
  /** An export that is served read-only. */
  readOnlyUri?: string | undefined;
  /** A server that takes STARTTLS with x509 certificates, as a plain nbd URI. */
  tlsUri?: string | undefined;
  /** A folder with client-cert.pem and client-key.pem, for a server that wants to see them. */
  tlsCertificates?: string | undefined;
}

export async function probe(uris: TargetUris): Promise<Target> {
  const { uri, readOnlyUri, tlsUri } = uris;
  const { address, exportName } = parseNbdUri(uri);
  const certificates = uris.tlsCertificates ?? null;
  const readOnly = readOnlyUri === undefined ? null : parseNbdUri(readOnlyUri);
  const granted = (option: number) =>
    onceAsked(address, async (haggle) => (await haggle.ask(option)).final === OptionReply.ACK);
  const extended = await granted(Option.EXTENDED_HEADERS);
  const refusesNames = await onceAsked(
    address,
    async (haggle) => (await haggle.ask(Option.INFO, infoData(UNKNOWN_NAME))).final !== OptionReply.ACK,
  );
  const lists = await granted(Option.LIST);
  const startsTls = tlsUri === undefined && (await granted(Option.STARTTLS));
  const tlsAt = tlsUri !== undefined ? parseNbdUri(tlsUri) : startsTls ? { address, exportName } : null;
  return onceAsked(address, async (haggle) => {
    const structured = (await haggle.ask(Option.STRUCTURED_REPLY)).final === OptionReply.ACK;
    const listed = await haggle.ask(Option.LIST_META_CONTEXT, metaData(exportName, []));
    const contexts =
      listed.final === OptionReply.ACK ? contextsOf(listed.all.slice(0, -1)).map(({ name }) => name) : [];
    // Not INFO: nbd-server tells a size only to a client that it lets in.
    const described = await haggle.ask(Option.GO, infoData(exportName, [Info.BLOCK_SIZE]));
    if (described.final !== OptionReply.ACK)
      throw new Error(`the server does not offer this export: ${nameOf(described.final)}`);
    return {
      uri,
      address,
      exportName,
      facts: factsOf(described.all.slice(0, -1)),
      structured,
      extended,
      refusesNames,
      lists,
      contexts,
      readOnlyAddress: readOnly?.address ?? null,
      readOnlyName: readOnly?.exportName ?? '',
      tls: tlsAt === null ? null : { ...tlsAt, certificates },
    };
  });
}

async function onceAsked<T>(address: NbdAddress, ask: (haggle: Haggle) => Promise<T>): Promise<T> {
  const wire = await Wire.connect(address);
  try {
    return await ask(await Haggle.begin(wire));
  } finally {
    wire.close();
  }
}
