// A server of two exports without a transmission phase: `node listener-main.js [ADDR]...`. Without ADDR it takes what it was
// activated with. With a TCP or unix ADDR it prints its NBD URIs when ready (else standard output belongs to the client). Ends on
// SIGTERM, or with the client on stdio.
import { pino } from 'pino';
import { activatedAddresses, parseListenAddress } from '../../src/nbd/address.js';
import { Listener } from '../../src/nbd/server/listener.js';
import { directory, entry } from './handshake.js';
import { idleSessions } from './idle-session.js';

const words = process.argv.slice(2);
const activated = activatedAddresses(process.env, process.pid);
const log = pino(pino.destination(2));
const listener = await Listener.open({
  addresses: words.length > 0 ? words.map(parseListenAddress) : activated,
  exports: directory(
    entry('disk', { description: 'the root disk', size: 80 << 20 }),
    entry('data', { readOnly: true, size: (1 << 20) + 512, preferredBlock: 65_536 }),
  ),
  startSession: idleSessions().start,
  log,
});
log.info({ uris: listener.addresses('disk') }, 'ready');
const stop = () => void listener.close();
process.once('SIGTERM', stop);
void listener.stdioClosed.then(stop);
if (listener.addresses().length > 0 && activated.length === 0)
  console.log(JSON.stringify(listener.addresses('disk')));
