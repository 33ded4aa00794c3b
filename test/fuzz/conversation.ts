/**
 * One connection as somebody sees it who reads along in both directions: takes what each side sends, in any pieces, and says where one
 * of them breaks the protocol. The handshake here, what follows in transmission.ts. Shares no code with src.
 */
import { ByteQueue } from './bytes.js';
import { Breach, checkText, type Terms, Transmission } from './transmission.js';
import {
  GREETING,
  OPT,
  OPTION_MAGIC,
  OPTION_REPLY_MAGIC,
  REP,
  type Unit,
  type UnitKind,
  unitOf,
} from './wire.js';

type Phase =
  | { at: 'greeting' | 'flags' | 'option' }
  /** The client's option is there, or on its way past us; the server answers it. */
  | { at: 'answer'; option: number }
  | { at: 'export-name' }
  | { at: 'transmission'; transmission: Transmission }
  /** The client has taken its leave. */
  | { at: 'over' }
  /** We cannot read what follows. */
  | { at: 'tls' };

export interface ConversationOptions {
  /** Units as they are complete. */
  onUnit?: (side: 'client' | 'server', unit: Unit) => void;
  /** See `Transmission`. */
  lenient?: boolean;
}

/** Data of an option that is too much for any server. */
const OPTION_MAX = 32 << 20;
/** A server need not bear with more options than that. */
const PATIENCE = 32;

export class Conversation {
  /** The first thing each side must not have sent. */
  clientBreach: string | null = null;
  serverBreach: string | null = null;
  /** Options sent in full. */
  options = 0;
  terms: Terms | null = null;
  readonly #client = new ByteQueue();
  readonly #server = new ByteQueue();
  #phase: Phase = { at: 'greeting' };
  #noZeroes = false;
  #structured = false;
  #extended = false;
  /** Of the last SET_META_CONTEXT. All names stand for one export here, so they count whatever name GO uses. */
  #contexts = new Map<number, string>();
  /** An option whose data has not all come. */
  #announced: number | null = null;
  /** Of the answer that is coming. */
  #export: { size: bigint; flags: number } | null = null;
  #granted = new Map<number, string>();
  readonly #onUnit: (side: 'client' | 'server', unit: Unit) => void;

  constructor(private readonly settings: ConversationOptions = {}) {
    this.#onUnit = settings.onUnit ?? (() => {});
  }

  get transmission(): Transmission | null {
    return this.#phase.at === 'transmission' ? this.#phase.transmission : null;
  }

  /** Nothing is owed by the server. */
  get settled(): boolean {
    if (this.#phase.at === 'transmission') return this.#phase.transmission.waiting === 0 || this.lost;
    return this.#phase.at !== 'answer' && this.#phase.at !== 'export-name' && this.#phase.at !== 'greeting';
  }

  /** It cannot be told any more what is going on. */
  get lost(): boolean {
    return this.transmission?.lost != null;
  }

  /** TLS has begun. */
  get opaque(): boolean {
    return this.#phase.at === 'tls';
  }

  /** The client said goodbye: DISC or ABORT; or what it says is between it and the server. */
  get farewell(): boolean {
    return this.#phase.at === 'over' || this.opaque || this.transmission?.disconnected === true;
  }

  /** The server need not wait for anything: it may hang up. */
  get mayHangUp(): boolean {
    if (this.clientBreach !== null || this.farewell || this.lost) return true;
    // Who goes on without waiting for the answer to STARTTLS is cut off, perhaps before that answer has left.
    if (this.#phase.at === 'answer' && this.#phase.option === OPT.STARTTLS) return true;
    if (this.#phase.at === 'export-name' || this.#announced === OPT.EXPORT_NAME) return true;
    return this.options >= PATIENCE;
  }

  /** Bytes of a server's unit that is not complete. */
  get partial(): number {
    return this.#server.length;
  }

  sent(bytes: Uint8Array): void {
    if (this.clientBreach === null) this.#client.push(bytes);
    this.#run();
  }

  received(bytes: Uint8Array): void {
    if (this.serverBreach === null) this.#server.push(bytes);
    this.#run();
  }

  /** All steps of the client that can be made, then one of the server: what it may say depends on what it was asked. */
  #run(): void {
    for (let moved = true; moved; ) {
      try {
        while (this.clientBreach === null && this.#clientStep());
      } catch (error) {
        this.clientBreach = (error as Error).message;
        this.#client.clear();
      }
      try {
        moved = this.serverBreach === null && this.#serverStep();
      } catch (error) {
        this.serverBreach = (error as Error).message;
        this.#server.clear();
        moved = false;
      }
    }
  }

  #take(side: 'client' | 'server', kind: UnitKind, length: number): Buffer {
    const bytes = (side === 'client' ? this.#client : this.#server).take(length);
    this.#onUnit(side, unitOf(kind, bytes));
    return bytes;
  }

  // The client's side

  #clientStep(): boolean {
    switch (this.#phase.at) {
      case 'flags':
        return this.#flags();
      case 'option':
        return this.#option();
      case 'transmission':
        return this.#phase.transmission.readRequest(this.#client);
      case 'over':
      case 'tls':
        this.#client.clear();
        return false;
      default:
        return false; // it speaks before it is asked: that waits
    }
  }

  #flags(): boolean {
    if (this.#client.length < 4) return false;
    const flags = this.#take('client', 'flags', 4).readUInt32BE(0);
    if (flags > 3) throw new Breach(`client flags ${flags}`);
    this.#noZeroes = (flags & 2) !== 0;
    this.#phase = { at: 'option' };
    return true;
  }

  #option(): boolean {
    const head = this.#client.peek(16);
    if (head === null) return false;
    if (!head.subarray(0, 8).equals(OPTION_MAGIC)) throw new Breach('option magic');
    const option = head.readUInt32BE(8);
    const length = head.readUInt32BE(12);
    if (length > OPTION_MAX) throw new Breach(`an option of ${length} bytes`);
    this.#announced = option;
    if (this.#client.length < 16 + length) return false;
    this.#announced = null;
    this.#take('client', 'option', 16 + length);
    this.options++;
    this.#export = null;
    this.#granted = new Map();
    if (option === OPT.EXPORT_NAME) this.#phase = { at: 'export-name' };
    else this.#phase = { at: 'answer', option };
    if (option === OPT.SET_META) this.#contexts = new Map();
    return true;
  }

  // The server's side

  #serverStep(): boolean {
    switch (this.#phase.at) {
      case 'greeting':
        return this.#greeting();
      case 'answer':
        return this.#reply(this.#phase.option);
      case 'export-name':
        return this.#exportName();
      case 'transmission':
        return this.#phase.transmission.readReply(this.#server);
      case 'tls':
        this.#server.clear();
        return false;
      default:
        // Read again later it is an early answer.
        if (this.#server.length > 0 && this.settings.lenient !== true)
          throw new Breach('the server speaks out of turn');
        return false;
    }
  }

  #greeting(): boolean {
    if (this.#server.length < 18) return false;
    const bytes = this.#take('server', 'greeting', 18);
    if (bytes.toString('latin1', 0, 16) !== GREETING) throw new Breach('the greeting');
    const flags = bytes.readUInt16BE(16);
    if ((flags & ~3) !== 0 && this.settings.lenient !== true) throw new Breach(`handshake flags ${flags}`);
    this.#phase = { at: 'flags' };
    return true;
  }

  #exportName(): boolean {
    const length = 10 + (this.#noZeroes ? 0 : 124);
    if (this.#server.length < length) return false;
    const bytes = this.#take('server', 'export', length);
    if (bytes.subarray(10).some((byte) => byte !== 0) && this.settings.lenient !== true)
      throw new Breach('124 bytes that are not zero');
    this.#export = { size: bytes.readBigUInt64BE(0), flags: bytes.readUInt16BE(8) };
    this.#transmission();
    return true;
  }

  #reply(option: number): boolean {
    const head = this.#server.peek(20);
    if (head === null) return false;
    if (head.readBigUInt64BE(0) !== OPTION_REPLY_MAGIC) throw new Breach('option reply magic');
    if (head.readUInt32BE(8) !== option) throw new Breach(`an answer to option ${head.readUInt32BE(8)}`);
    const type = head.readUInt32BE(12);
    const length = head.readUInt32BE(16);
    if (length > OPTION_MAX) throw new Breach(`an option reply of ${length} bytes`);
    if (this.#server.length < 20 + length) return false;
    const payload = this.#take('server', 'option-reply', 20 + length).subarray(20);
    if (type >= REP.ERROR) this.#refusal(type, payload);
    else if (type === REP.ACK) this.#acknowledged(option, payload);
    else this.#information(option, type, payload);
    return true;
  }

  #refusal(type: number, payload: Buffer): void {
    if (this.settings.lenient !== true) {
      if (type === REP.ERROR || type > REP.ERROR_LAST) throw new Breach(`error type ${type.toString(16)}`);
      checkText(payload);
    }
    this.#phase = { at: 'option' };
  }

  #information(option: number, type: number, payload: Buffer): void {
    const need = (bytes: number): void => {
      if (payload.length < bytes) throw new Breach(`a reply of ${payload.length} bytes and type ${type}`);
    };
    if (type === REP.SERVER && option === OPT.LIST) {
      need(4);
      need(4 + payload.readUInt32BE(0));
      checkText(payload.subarray(4, 4 + payload.readUInt32BE(0)));
    } else if (type === REP.INFO && (option === OPT.INFO || option === OPT.GO)) {
      need(2);
      const info = payload.readUInt16BE(0);
      if (info === 0) {
        if (payload.length !== 12) throw new Breach(`INFO_EXPORT of ${payload.length} bytes`);
        this.#export = { size: payload.readBigUInt64BE(2), flags: payload.readUInt16BE(10) };
      } else if (info === 3 && payload.length !== 14) throw new Breach('INFO_BLOCK_SIZE of a wrong length');
      else if (info === 1 || info === 2) checkText(payload.subarray(2));
    } else if (type === REP.META_CONTEXT && (option === OPT.LIST_META || option === OPT.SET_META)) {
      need(5);
      const id = payload.readUInt32BE(0);
      checkText(payload.subarray(4));
      if (option === OPT.LIST_META) return;
      if (this.#granted.has(id)) throw new Breach(`two contexts with the id ${id}`);
      this.#granted.set(id, payload.toString('utf8', 4));
    } else throw new Breach(`a reply of type ${type} to option ${option}`);
  }

  #acknowledged(option: number, payload: Buffer): void {
    if (payload.length > 0) throw new Breach('an ACK with data');
    this.#phase = { at: 'option' };
    if (option === OPT.ABORT) this.#phase = { at: 'over' };
    else if (option === OPT.STARTTLS) this.#phase = { at: 'tls' };
    else if (option === OPT.STRUCTURED) this.#structured = true;
    else if (option === OPT.EXTENDED) this.#extended = this.#structured = true;
    else if (option === OPT.SET_META) {
      this.#contexts = this.#granted;
    } else if (option === OPT.INFO || option === OPT.GO) {
      if (this.#export === null) throw new Breach('an ACK without INFO_EXPORT');
      if (option === OPT.GO) this.#transmission();
    }
  }

  #transmission(): void {
    const { size, flags } = this.#export!;
    this.terms = {
      size,
      flags,
      structured: this.#structured,
      extended: this.#extended,
      contexts: this.#contexts,
    };
    const lenient = this.settings.lenient === true;
    this.#phase = { at: 'transmission', transmission: new Transmission(this.terms, lenient, this.#onUnit) };
  }
}
