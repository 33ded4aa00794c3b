/**
 * A directory of exports as one client may see it. What its rules keep from a client is not in it: every option is answered as if
 * the export did not exist, the default export included.
 */
import { type Client, couldBeLetIn, gradeOf } from './access.js';
import type { ExportDirectory, ExportEntry } from './exports.js';

export interface VisibleExportsParameters {
  exports: ExportDirectory;
  client: Client;
  /** The client is behind TLS. */
  secure: boolean;
  /** Told of an export that the client asked for by name and may not see. */
  denied?(entry: ExportEntry): void;
}

export class VisibleExports implements ExportDirectory {
  readonly #parameters: VisibleExportsParameters;

  constructor(parameters: VisibleExportsParameters) {
    this.#parameters = parameters;
  }

  get shuttingDown(): boolean {
    return this.#parameters.exports.shuttingDown;
  }

  list(): ExportEntry[] {
    return [...this.#visible()];
  }

  find(name: string): ExportEntry | undefined {
    if (name === '') return this.#theOnlyOne();
    const entry = this.#parameters.exports.find(name);
    if (entry === undefined) return undefined;
    const seen = this.#seen(entry);
    if (seen === undefined) this.#parameters.denied?.(entry);
    return seen;
  }

  #theOnlyOne(): ExportEntry | undefined {
    const visible = this.#visible();
    const first = visible.next();
    return first.done === true || visible.next().done !== true ? undefined : first.value;
  }

  *#visible(): Generator<ExportEntry, void> {
    for (const entry of this.#parameters.exports.list()) {
      const seen = this.#seen(entry);
      if (seen !== undefined) yield seen;
    }
  }

  #seen(entry: ExportEntry): ExportEntry | undefined {
    const { client, secure } = this.#parameters;
    switch (gradeOf(entry.access, client)) {
      case 'write':
        return entry;
      case 'read':
        return entry.readOnly ? entry : { ...entry, readOnly: true, open: () => entry.open() };
      case 'none':
        // The protocol wants clients told that this one demands TLS, where TLS could help them («SELECTIVETLS mode»).
        return entry.tlsOnly === true && !secure && couldBeLetIn(entry.access, client.origin)
          ? entry
          : undefined;
    }
  }
}
