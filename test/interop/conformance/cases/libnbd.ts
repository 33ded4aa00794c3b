/** A real client that is not held back: libnbd's Python with strict mode off. Its own errors-server tests are among these. */
import { strict as assert } from 'node:assert';
import { type Case, type Lab, must, should } from '../case.js';

const expects =
  (script: string, expected: unknown, connect = true, ready?: (lab: Lab) => unknown): Case['run'] =>
  async (lab) => {
    ready?.(lab);
    assert.deepEqual(await lab.python(script, connect), expected);
  };

const ALIVE = '\nh.pread(512, 0)';
const writable = (lab: Lab) => lab.needsWritable();
const contexts = (lab: Lab) => lab.needsContexts();
const show = (expression: string) => `${ALIVE}\nprint(json.dumps(${expression}))`;

export const libnbdCases = [
  should(
    'C3',
    'libnbd errors-server-invalid-offset: READ, WRITE and TRIM beyond the end',
    expects(
      `size = h.get_size()
r = [errno_of(h.pread, 512, size), errno_of(h.pwrite, bytes(512), size), errno_of(h.trim, 512, size)]${show('r')}`,
      ['EINVAL', 'ENOSPC', 'EINVAL'],
      true,
      (lab) => lab.needsFlag('SEND_TRIM'),
    ),
  ),
  should('C3', 'libnbd errors-server-unadvertised-cmd: TRIM on a server without it', async (lab) => {
    lab.needs((lab.target.facts.flags & (1 << 5)) === 0, 'a server without TRIM');
    assert.equal(await lab.python(`r = errno_of(h.trim, 512, 0)${show('r')}`), 'EINVAL');
  }),
  should(
    'C3',
    'libnbd errors-server-unknown-flags: READ with flag 0x8000',
    expects(`r = errno_of(h.pread, 512, 0, flags=0x8000)${show('r')}`, 'EINVAL'),
  ),
  should('C3', 'libnbd errors-server-unaligned: READ of 1 byte at 1', async (lab) => {
    const unaligned = (lab.target.facts.blocks?.minimum ?? 1) > 1;
    assert.equal(await lab.python(`r = errno_of(h.pread, 1, 1)${show('r')}`), unaligned ? 'EINVAL' : 'OK');
  }),
  should('C3', 'libnbd errors-server-zerosize: READ of length 0 does not disconnect', async (lab) =>
    String(await lab.python(`r = errno_of(h.pread, 0, 0)${show('r')}`)),
  ),
  must(
    'C3',
    'libnbd: pwrite, flush, pread',
    expects(
      `h.pwrite(b'blockferry' * 100, 12345); h.flush()${show("h.pread(1000, 12345) == b'blockferry' * 100")}`,
      true,
      true,
      writable,
    ),
  ),
  must(
    'C2',
    'libnbd: a hundred requests in flight',
    expects(
      `bufs = [nbd.Buffer(4096) for i in range(100)]
cookies = [h.aio_pread(b, i * 4096) for i, b in enumerate(bufs)]
while h.aio_in_flight() > 0: h.poll(-1)
r = all(h.aio_command_completed(c) for c in cookies)${show('r')}`,
      true,
    ),
  ),
  must(
    'C2',
    'libnbd: without structured replies',
    expects(
      `h.set_request_structured_replies(False); h.connect_uri(uri)${show('h.get_structured_replies_negotiated()')}`,
      false,
      false,
    ),
  ),
  ...[0, 1, 2, 3].map((flags) =>
    must(
      'C1',
      `libnbd: handshake flags ${flags}`,
      expects(`h.set_handshake_flags(${flags}); h.connect_uri(uri)${show('h.get_size() > 0')}`, true, false),
    ),
  ),
  must('C1', 'libnbd in opt mode: LIST, INFO, GO, one after the other', async (lab) => {
    lab.needs(lab.target.lists, 'LIST');
    const script = `h.set_opt_mode(True); h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append(name))
h.opt_info(); size = h.get_size(); h.opt_go()${show('[len(names) > 0, size == h.get_size()]')}`;
    assert.deepEqual(await lab.python(script, false), [true, true]);
  }),
  must(
    'C1',
    'libnbd in opt mode: INFO and GO of an unknown export, then the right one',
    expects(
      `h.set_opt_mode(True); h.connect_uri(uri); right = h.get_export_name()
h.set_export_name('no such export here'); a = errno_of(h.opt_info); b = errno_of(h.opt_go)
h.set_export_name(right); h.opt_go()${show("[a != 'OK', b != 'OK', h.get_size() > 0]")}`,
      [true, true, true],
      false,
      (lab) => lab.unknownName(),
    ),
  ),
  must(
    'C1',
    'libnbd in opt mode: ABORT',
    expects(
      `h.set_opt_mode(True); h.connect_uri(uri); h.opt_abort()\nprint(json.dumps(h.aio_is_closed()))`,
      true,
      false,
    ),
  ),
  must(
    'C1',
    'libnbd in opt mode: LIST_META_CONTEXT and base:allocation',
    expects(
      `h.set_opt_mode(True); h.connect_uri(uri); names = []
h.opt_list_meta_context(lambda name: names.append(name))
h.add_meta_context('base:allocation'); h.opt_go()${show("['base:allocation' in names, h.can_meta_context('base:allocation')]")}`,
      [true, true],
      false,
      contexts,
    ),
  ),
  must(
    'C3',
    'libnbd: block_status walks the export to its end',
    expects(
      `h.add_meta_context('base:allocation'); h.connect_uri(uri)
size = h.get_size(); at = 0
while at < size:
    step = []
    h.block_status(min(size - at, 1 << 30), at, lambda c, o, e, err: step.append(sum(e[::2])))
    at += step[0]${show('at >= size')}`,
      true,
      false,
      contexts,
    ),
  ),
  must(
    'C3',
    'libnbd: BLOCK_STATUS with REQ_ONE',
    expects(
      `h.add_meta_context('base:allocation'); h.connect_uri(uri); n = []
h.block_status(h.get_size() // 2, 0, lambda c, o, e, err: n.append(len(e)), nbd.CMD_FLAG_REQ_ONE)${show('n')}`,
      [2],
      false,
      contexts,
    ),
  ),
  must(
    'C3',
    'libnbd: pread_structured sees each byte once',
    expects(
      `seen = []
def chunk(data, offset, status, error):
    seen.append((offset, len(data)))
h.pread_structured(1 << 20, 0, chunk)
seen.sort(); at = 0; ok = True
for offset, length in seen:
    ok = ok and offset == at; at += length${show('[ok, at]')}`,
      [true, 1 << 20],
      true,
      (lab) => {
        lab.needsStructured();
        lab.needsSize(1 << 20);
      },
    ),
  ),
  must(
    'C3',
    'libnbd: zero with NO_HOLE and FUA, read back',
    expects(
      `h.pwrite(b'x' * 8192, 0); h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)${show("h.pread(8192, 0) == bytes(4096) + b'x' * 4096")}`,
      true,
      true,
      (lab) => {
        lab.needsFlag('SEND_WRITE_ZEROES');
        lab.needsFlag('SEND_FUA');
      },
    ),
  ),
  should(
    'C3',
    'libnbd: what is refused leaves the connection usable',
    expects(
      `size = h.get_size()
for f in (lambda: h.pread(512, size), lambda: h.pread(512, 0, flags=0x40), lambda: h.pwrite(bytes(512), size),
          lambda: h.pwrite(bytes(512), 0, flags=0x8000), lambda: h.cache(512, size), lambda: h.zero(512, size),
          lambda: h.block_status(512, size, lambda *a: 0)):
    errno_of(f)${show('h.aio_is_ready()')}`,
      true,
      true,
      (lab) => lab.needsFlag('SEND_CACHE'),
    ),
  ),
  must(
    'C2',
    'libnbd: shutdown ends the session in order',
    expects(`h.pread(512, 0); h.shutdown()\nprint(json.dumps(h.aio_is_closed()))`, true),
  ),
  must(
    'C2',
    'libnbd: four connections at once see what one wrote',
    expects(
      `others = [handle() for i in range(3)]
for o in others: o.connect_uri(uri)
h.pwrite(b'four' * 128, 512); h.flush()${show("all(o.pread(512, 512) == b'four' * 128 for o in others)")}`,
      true,
      true,
      (lab) => lab.needsFlag('CAN_MULTI_CONN'),
    ),
  ),
];
