/**
 * Which metadata contexts a client's queries mean. A query is `namespace:leaf`; what belongs to a namespace or leaf we do not
 * have is ignored. Sources: proto.md, «Metadata querying»; QEMU, docs/interop/nbd.txt (where `qemu:` and
 * `qemu:dirty-bitmap:` are wildcards of LIST as `base:` is).
 */

export interface SelectedContext {
  /** Unique among an export's contexts; the same one for the same context, whatever else is selected. */
  readonly id: number;
  readonly name: string;
}

/** LIST_META_CONTEXT: no query means all; a query that ends in a colon means all that start with it. */
export function listContexts(available: readonly string[], queries: readonly string[]): readonly string[] {
  if (queries.length === 0) return available;
  const exact = new Set(queries);
  const wildcards = [...exact].filter((query) => query.endsWith(':'));
  return available.filter((name) => exact.has(name) || wildcards.some((prefix) => name.startsWith(prefix)));
}

/** SET_META_CONTEXT: exact names only; no query means none. */
export function selectContexts(available: readonly string[], queries: readonly string[]): SelectedContext[] {
  const exact = new Set(queries);
  return available.map((name, index) => ({ id: index + 1, name })).filter(({ name }) => exact.has(name));
}

/** The payload of a BLOCK_STATUS that asks for some of the selected contexts: an effect length of 8 bytes, ids of 4. */
export const FILTER_BYTES_MIN = 12;

export function filterBytesMax(selected: readonly SelectedContext[]): number {
  return 8 + 4 * selected.length;
}

/** What such a payload asks for; null if an id is of no selected context, or there twice. The length is rounded beyond 2^53. */
export function filterContexts(
  selected: readonly SelectedContext[],
  payload: Buffer,
): { length: number; contexts: SelectedContext[] } | null {
  const contexts: SelectedContext[] = [];
  for (let at = 8; at < payload.length; at += 4) {
    const id = payload.readUInt32BE(at);
    const context = selected.find((one) => one.id === id);
    if (context === undefined || contexts.includes(context)) return null;
    contexts.push(context);
  }
  return { length: Number(payload.readBigUInt64BE(0)), contexts };
}
