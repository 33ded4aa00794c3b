/** What the tests use of @vates/nbd-client, which comes without declarations. Source: its README and the JSDoc in its sources, 3.6. */

interface VatesTimes {
  /** Milliseconds. */
  connectTimeout?: number;
  messageTimeout?: number;
  waitBeforeReconnect?: number;
  readBlockRetries?: number;
  reconnectRetry?: number;
}

interface VatesAddress {
  address: string;
  port?: number;
  exportname?: string;
  /** Turns TLS on; the server's certificate is not checked. */
  cert?: string;
}

interface VatesExtent {
  offset: number;
  length: number;
  type: number;
}

declare class VatesClient {
  readonly exportSize: bigint;
  readonly connected: boolean;
  connect(): Promise<void>;
  disconnect(): Promise<void>;
  reconnect(): Promise<void>;
  /** Bytes [index * size, (index + 1) * size), fewer at the end. */
  readBlock(index: number, size?: number): Promise<Buffer>;
  getMap(): Promise<VatesExtent[]>;
}

declare module '@vates/nbd-client' {
  export default class NbdClient extends VatesClient {
    constructor(where: VatesAddress, times?: VatesTimes);
  }
  export class NbdStdioClient extends VatesClient {
    constructor(what: { command: string; args?: string[]; exportname?: string }, times?: VatesTimes);
  }
}

declare module '@vates/nbd-client/multi.mjs' {
  export default class MultiNbdClient {
    constructor(
      where: VatesAddress | VatesAddress[],
      options?: VatesTimes & { nbdConcurrency?: number; readAhead?: number },
    );
    readonly exportSize: bigint;
    connect(): Promise<void>;
    disconnect(): Promise<void>;
    readBlock(index: number, size?: number): Promise<Buffer>;
    readBlocks(indexes: () => Iterable<{ index: number; size: number }>): AsyncIterable<Buffer>;
  }
}

declare module '@vates/nbd-client/NbdDisk.mjs' {
  export class NbdDisk {
    constructor(where: VatesAddress, blockBytes: number);
    init(): Promise<void>;
    close(): Promise<void>;
    getVirtualSize(): number;
    getBlockIndexes(): number[];
    hasBlock(index: number): boolean;
    readBlock(index: number): Promise<{ index: number; data: Buffer }>;
  }
}
