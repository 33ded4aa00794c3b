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
