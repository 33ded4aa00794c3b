/**
 * Which bytes of a read have arrived: disjoint, never adjacent intervals in ascending order.
 *
 * Servers answer in one chunk or in ascending chunks, so one interval is nearly always enough and lives in two fields.
 * Only when chunks leave gaps is there a list: [from, to, from, to, ...].
 */
export class Coverage {
  #from = 0;
  #to = 0;
  #list: number[] | null = null;

  clear(): void {
    this.#from = 0;
    this.#to = 0;
    this.#list = null;
  }

  /** Separate intervals held, 0 while there is at most one: what it costs in memory. */
  get fragments(): number {
    return this.#list === null ? 0 : this.#list.length >> 1;
  }

  /** Adds [from, to), from < to. False, and nothing is added, when a byte of it is there already. */
  add(from: number, to: number): boolean {
    if (this.#list !== null) return this.#addToList(this.#list, from, to);
    if (this.#from === this.#to) {
      this.#from = from;
      this.#to = to;
    } else if (from === this.#to) {
      this.#to = to;
    } else if (to === this.#from) {
      this.#from = from;
    } else if (from > this.#to) {
      this.#list = [this.#from, this.#to, from, to];
    } else if (to < this.#from) {
      this.#list = [from, to, this.#from, this.#to];
    } else {
      return false;
    }
    return true;
  }

  /** Every byte of [from, to) is there, and nothing else. */
  isExactly(from: number, to: number): boolean {
    return this.#list === null && this.#from === from && this.#to === to;
  }

  #addToList(list: number[], from: number, to: number): boolean {
    // The first interval that starts behind `from`.
    let low = 0;
    let high = list.length >> 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((list[2 * middle] as number) <= from) low = middle + 1;
      else high = middle;
    }
    const next = 2 * low;
    const nextFrom = next < list.length ? (list[next] as number) : Number.POSITIVE_INFINITY;
    const previousTo = next > 0 ? (list[next - 1] as number) : Number.NEGATIVE_INFINITY;
    if (previousTo > from || nextFrom < to) return false;
    if (previousTo === from && nextFrom === to) {
      list.splice(next - 1, 2);
      if (list.length === 2) {
        [this.#from, this.#to] = list as [number, number];
        this.#list = null;
      }
    } else if (previousTo === from) list[next - 1] = to;
    else if (nextFrom === to) list[next] = from;
    else list.splice(next, 0, from, to);
    return true;
  }
}
