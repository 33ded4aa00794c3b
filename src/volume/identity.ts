/**
 * volume.json: what a volume is, replaced atomically and durably before anything acts on the change.
 *
 * Invariants
 * - `generation` never falls. A takeover takes a generation greater than the one here, and stores it with the phase in one step.
 *   A retreat keeps the number (it is burnt) and changes only the phase; unseal raises it to the burnt one.
 * - `mapEpoch` rises whenever all presence bits are dropped; bits stored under another epoch count for nothing.
 * - `written` is durable before the first guest write after a takeover is answered, or says that the machine is known to run
 *   here: a retreat is possible only while it is false, and a hand-off only once it is true.
 * - What is stored can be read back: a change that does not fit the schema is refused.
 * - `preCopy.cookie` names a round only after its list was applied to the presence bits, and no takeover stores a phase before it was.
 * - `imageStamp` is dropped, durably, before anything else is written to a retired volume's image.
 * - `openBootId` is the boot under which the maps were opened and not yet closed: in that boot only presence.live is the truth.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { BlockferryError, messageOf } from '../errors.js';
import { makeFolder, removeFile, replaceFile } from './files.js';
import { PHASES } from './phase.js';

const schema = z.strictObject({
  format: z.literal(1),
  id: z.uuid(),
  name: z.string().min(1).max(255),
  image: z.string().startsWith('/'),
  size: z.int().positive(),
  phase: z.enum(PHASES),
  generation: z.int().positive(),
  mapEpoch: z.int().positive(),
  /** The generation a sealed volume was sealed for. */
  sealedFor: z.int().positive().nullable(),
  written: z.boolean(),
  source: z
    .strictObject({
      uri: z.string(),
      /** What the source said of itself when first met; another blockferry names its volume and generation there. */
      description: z.string().nullable(),
    })
    .nullable(),
  /** A standby that takes over by itself at the guest's first write, because no coordinator does. */
  takesOverAtWrite: z.boolean(),
  /** A standby that copies ahead of its takeover, or has an old image of the same volume. Absent: nothing is here before the takeover. */
  preCopy: z
    .strictObject({
      /** What the source is asked for its changes. */
      context: z.string(),
      /** The round whose changes were taken to heart (dirty.ts); null: the source has no rounds, and tells all changes since the beginning. */
      cookie: z.int().positive().nullable(),
      /** Blocks are copied before the takeover. */
      fills: z.boolean(),
    })
    .nullable()
    .default(null),
  /** Of the image of a retired volume, when it was retired: while that is so, it is that generation's. Null: it is not known to be. */
  imageStamp: z.string().nullable().default(null),
  /** The image was made by us, so that cancelling a standby may delete it. */
  imageCreated: z.boolean(),
  openBootId: z.string().nullable(),
  created: z.iso.datetime(),
  handoffAt: z.iso.datetime().nullable(),
});

export type Identity = z.infer<typeof schema>;

export const IDENTITY_FILE = 'volume.json';

/** Reads and checks a volume's identity; undefined where there is none. Throws 'state-damaged'. */
export async function readIdentity(folder: string): Promise<Identity | undefined> {
  const path = join(folder, IDENTITY_FILE);
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw new BlockferryError('state-damaged', `cannot read ${path}: ${messageOf(error)}`, { cause: error });
  }
  try {
    return schema.parse(JSON.parse(text));
  } catch (cause) {
    const why = cause instanceof z.ZodError ? describe(cause) : messageOf(cause);
    throw new BlockferryError(
      'state-damaged',
      `${path} is damaged (${why}): the volume is not opened, restore that file from a copy`,
      { cause },
    );
  }
}

/** "size: Invalid input; phase: ...", of the first few. */
function describe(error: z.ZodError): string {
  const issues = error.issues.slice(0, 3);
  return issues
    .map(({ path, message }) => `${path.length === 0 ? 'the file' : path.join('.')}: ${message}`)
    .join('; ');
}

/** What could not be read back is not written either: a volume would be lost to a wrong number from a peer. */
function checkStorable(identity: Identity): void {
  const { error } = schema.safeParse(identity);
  if (error === undefined) return;
  const why = describe(error);
  throw new BlockferryError('usage', `volume ${identity.name} cannot be stored like this (${why})`);
}

/** The identity of an open volume. Changes are made one after the other, each durable before it is visible here. */
export class IdentityFile {
  #current: Identity;
  #last: Promise<unknown> = Promise.resolve();
  #stored: boolean;

  /** `stored`: the file exists. A plain volume that was only served has none until something must be remembered. */
  constructor(
    readonly folder: string,
    current: Identity,
    options: { stored: boolean },
  ) {
    this.#current = Object.freeze(current);
    this.#stored = options.stored;
  }

  get current(): Readonly<Identity> {
    return this.#current;
  }

  get stored(): boolean {
    return this.#stored;
  }

  /** Applies `change` to the identity as it is when its turn comes. */
  update(change: Partial<Identity>): Promise<void> {
    const step = this.#last.then(async () => {
      const next = Object.freeze({ ...this.#current, ...change });
      checkStorable(next);
      if (!this.#stored) await makeFolder(this.folder);
      await replaceFile(join(this.folder, IDENTITY_FILE), `${JSON.stringify(next, null, 2)}\n`);
      this.#stored = true;
      this.#current = next;
    });
    this.#last = step.catch(() => undefined);
    return step;
  }

  /** Forgets the volume, durably. */
  async remove(): Promise<void> {
    await this.#last;
    if (this.#stored) await removeFile(join(this.folder, IDENTITY_FILE));
    this.#stored = false;
  }
}
