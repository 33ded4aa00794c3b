/** The server under test: where it is, and what it offers, found out by asking. */
import { Info, Option, OptionReply } from '../../../src/nbd/constants.js';
import { type NbdAddress, parseNbdUri } from '../../../src/nbd/uri.js';
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
  /** LIST is not refused. */
  readonly lists: boolean;
  /** Metadata contexts the server lists. */
  readonly contexts: readonly string[];
  readonly readOnlyAddress: NbdAddress | null;
  readonly readOnlyName: string;
  /** A server that takes STARTTLS: the same one, or another of the same make. */
  readonly tls: { readonly address: NbdAddress; readonly exportName: string } | null;
}

export interface TargetUris {
  uri: string;
  /** An export that is served read-only. */
  readOnlyUri?: string | undefined;
  /** A server that takes STARTTLS without client certificates, as a plain nbd URI. */
  tlsUri?: string | undefined;
}

export async function probe({ uri, readOnlyUri, tlsUri }: TargetUris): Promise<Target> {
  const { address, exportName } = parseNbdUri(uri);
  const readOnly = readOnlyUri === undefined ? null : parseNbdUri(readOnlyUri);
  const granted = (option: number) =>
    onceAsked(address, async (haggle) => (await haggle.ask(option)).final === OptionReply.ACK);
  const extended = await granted(Option.EXTENDED_HEADERS);
  const lists = await granted(Option.LIST);
  const startsTls = tlsUri === undefined && (await granted(Option.STARTTLS));
  return onceAsked(address, async (haggle) => {
    const structured = (await haggle.ask(Option.STRUCTURED_REPLY)).final === OptionReply.ACK;
    const listed = await haggle.ask(Option.LIST_META_CONTEXT, metaData(exportName, []));
    const contexts =
      listed.final === OptionReply.ACK ? contextsOf(listed.all.slice(0, -1)).map(({ name }) => name) : [];
    const described = await haggle.ask(Option.INFO, infoData(exportName, [Info.BLOCK_SIZE]));
    if (described.final !== OptionReply.ACK)
      throw new Error(`the server does not offer this export: ${nameOf(described.final)}`);
    return {
      uri,
      address,
      exportName,
      facts: factsOf(described.all.slice(0, -1)),
      structured,
      extended,
      lists,
      contexts,
      readOnlyAddress: readOnly?.address ?? null,
      readOnlyName: readOnly?.exportName ?? '',
      tls: tlsUri !== undefined ? parseNbdUri(tlsUri) : startsTls ? { address, exportName } : null,
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
