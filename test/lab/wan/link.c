/*
 * The WAN lab's link: a TUN device in each of two network namespaces, and between them a line with a set rate, queue, round trip
 * and loss. It delays and drops packets and does nothing else to them, so TCP at both ends behaves as over a real line.
 *
 *   link NAMESPACE_A NAMESPACE_B DEVICE OFFLOAD SEED RATE RTT QUEUE LOSS
 *
 * Namespaces are paths below /run/netns. RATE is in bits a second, RTT and QUEUE in nanoseconds, LOSS in millionths. OFFLOAD 1: the
 * kernel hands over and takes TCP segments of up to 64 KiB, which high rates need; each counts on the line as the packets it stands for, but is
 * dropped, lost and delivered as one. `ready` on stdout: both devices are there. Then commands on stdin, each answered by a line:
 *   set RATE RTT QUEUE LOSS   for packets that come from now on                                        ok, or error WHY
 *   cut                       loses what is on the line, and whatever comes                            ok
 *   restore                                                                                            ok
 *   stats                     counters of both directions since the start                              JSON
 * It ends with stdin, and with its parent.
 *
 * A packet is read and stamped; waits until the transmitter has sent what came before (the queue: it is dropped if it would wait longer
 * than QUEUE); is sent in the time that RATE gives its bytes; and is written to the other device RTT/2 later. A lost packet was sent.
 *
 * Invariants, whatever the scheduler does to this process:
 * - A packet is never delivered before its stamp + its own time on the line + RTT/2: lateness adds to the delay, nothing takes from it.
 * - `free_ns`, when the transmitter is done with all it took, grows by the exact time of each packet (rounded up) and never falls behind
 *   the present: there is no burst, and no long run, above RATE.
 * - Packets leave in the order they came: due times along the line never fall, also when RTT was reduced.
 * - The nth packet of a direction draws the nth random number of its generator: SEED alone says which are lost.
 * - packets read = delivered + dropped + lost + cut + overflow + refused + on the line.
 * - After the answer to `cut` nothing is delivered until `restore`.
 * - Memory is two rings, reserved at the start; a set line that could not fit is refused.
 *
 * A direction is one thread that reads, waits and writes; it holds its lock except while it sleeps. Commands take the lock by the turnstile,
 * behind which the thread has to queue: a busy direction cannot keep them out.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum {
  BATCH = 64, /* packets read before what is due is written, and written before what came is read */
  UNIT_MAX = 65536 + sizeof(struct virtio_net_hdr),
  LINE_MAX_BYTES = 256, /* of a command */
  TCP_HEADER_MIN = 20,
  TCP_OFFSET_AT = 12,
};
#define RING_BYTES (128UL << 20)
#define ENTRY_BYTES_MAX (sizeof(struct entry) + UNIT_MAX + 8)
#define NS_PER_S 1000000000ULL
#define MILLION 1000000ULL
#define RATE_MIN 1000ULL
#define RATE_MAX 100000000000ULL
#define TIME_MAX_NS (10 * NS_PER_S)
#define WRAP UINT32_MAX

struct settings {
  uint64_t rate, rtt_ns, queue_ns, loss;
};

/* A packet on the line, in the ring; its bytes follow. */
struct entry {
  uint64_t due_ns;
  uint32_t length; /* WRAP: the next entry is at the ring's start */
  uint32_t wire;   /* bytes it counts for on the line */
};

struct count {
  uint64_t packets, bytes;
};

struct direction {
  pthread_mutex_t turnstile, lock;
  int from, to;
  struct settings set;
  bool cut;
  uint64_t free_ns, last_due_ns, random;
  /* Entries lie from head to tail. It wraps where `soft` says, if it can, so that a short line stays in little memory. */
  uint8_t *ring;
  size_t head, tail, soft;
  struct count read, delivered, dropped, lost, cut_off, overflow, refused, line;
  uint64_t queue_sum_ns, queue_max_ns, late_sum_ns, late_max_ns;
};

static struct direction directions[2];
static bool offload;
static uint8_t scratch[2][UNIT_MAX]; /* what there is no room for must be read too */

_Noreturn static void die(const char *format, ...) {
  int error = errno;
  va_list words;
  va_start(words, format);
  fprintf(stderr, "link: ");
  vfprintf(stderr, format, words);
  fprintf(stderr, ": %s\n", strerror(error));
  va_end(words);
  _exit(1);
}

static uint64_t now_ns(void) {
  struct timespec now;
  if (clock_gettime(CLOCK_MONOTONIC, &now) != 0) die("clock_gettime");
  return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

/* splitmix64 */
static uint64_t draw(uint64_t *state) {
  uint64_t x = *state += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

static void add(struct count *count, uint32_t bytes) {
  count->packets++;
  count->bytes += bytes;
}

/* Room in the ring for the entries of this line, also if all are as small as packets get. */
static uint64_t ring_need(const struct settings *set) {
  unsigned __int128 bits = (unsigned __int128)set->rate * (set->rtt_ns / 2 + set->queue_ns) / NS_PER_S;
  return (uint64_t)(bits / 8) * 2 + 4 * ENTRY_BYTES_MAX;
}

/* NULL, or why these settings cannot be. */
static const char *unfit(const struct settings *set) {
  if (set->rate < RATE_MIN || set->rate > RATE_MAX) return "the rate is not from 1 kbit/s to 100 Gbit/s";
  if (set->rtt_ns > TIME_MAX_NS || set->queue_ns > TIME_MAX_NS) return "the round trip or the queue is above 10 s";
  if (set->loss > MILLION) return "the loss is above 100 %";
  if (ring_need(set) > RING_BYTES) return "the line would hold more than 64 MiB";
  return NULL;
}

/* Where the next entry can be written, or NULL if the ring is full. Between tail and head at least one byte stays free. */
static struct entry *room(struct direction *d) {
  if (d->head == d->tail) d->head = d->tail = 0;
  if (d->tail < d->head) return d->head - d->tail > ENTRY_BYTES_MAX ? (struct entry *)(d->ring + d->tail) : NULL;
  bool start_free = d->head > ENTRY_BYTES_MAX, end_free = RING_BYTES - d->tail >= ENTRY_BYTES_MAX + sizeof(struct entry);
  if (start_free && (d->tail >= d->soft || !end_free)) {
    ((struct entry *)(d->ring + d->tail))->length = WRAP;
    d->tail = 0;
    return (struct entry *)d->ring;
  }
  return end_free ? (struct entry *)(d->ring + d->tail) : NULL;
}

/* Bytes on the line of what was read: a segment for the kernel to cut up counts for the packets it becomes, each with its headers. */
static uint32_t wire_bytes(const uint8_t *unit, size_t length) {
  if (!offload) return (uint32_t)length;
  struct virtio_net_hdr header;
  if (length <= sizeof header) return (uint32_t)length;
  memcpy(&header, unit, sizeof header);
  uint32_t bytes = (uint32_t)(length - sizeof header);
  const uint8_t *packet = unit + sizeof header;
  if (header.gso_type == VIRTIO_NET_HDR_GSO_NONE || header.gso_size == 0) return bytes;
  if ((uint32_t)header.csum_start + TCP_HEADER_MIN > bytes) return bytes;
  uint32_t headers = header.csum_start + (packet[header.csum_start + TCP_OFFSET_AT] >> 4) * 4U;
  if (headers >= bytes) return bytes;
  uint32_t segments = (bytes - headers + header.gso_size - 1) / header.gso_size;
  return bytes + (segments - 1) * headers;
}

/* Puts a packet that was just read on the line, unless it is dropped or lost. */
static void accept_packet(struct direction *d, struct entry *entry, size_t length, uint32_t wire, uint64_t now) {
  bool lost = draw(&d->random) % MILLION < d->set.loss;
  uint64_t start = d->free_ns > now ? d->free_ns : now, waits = start - now;
  if (waits > d->set.queue_ns) return add(&d->dropped, wire);
  if (entry == NULL) return add(&d->overflow, wire);
  d->free_ns = start + (wire * 8 * NS_PER_S + d->set.rate - 1) / d->set.rate;
  d->queue_sum_ns += waits;
  if (waits > d->queue_max_ns) d->queue_max_ns = waits;
  if (lost) return add(&d->lost, wire);
  uint64_t due = d->free_ns + d->set.rtt_ns / 2;
  if (due < d->last_due_ns) due = d->last_due_ns;
  *entry = (struct entry){.due_ns = d->last_due_ns = due, .length = (uint32_t)length, .wire = wire};
  d->tail += sizeof *entry + ((length + 7) & ~(size_t)7);
  add(&d->line, wire);
}

/* Reads what has come, a batch at most; true if there may be more. */
static bool receive(struct direction *d) {
  for (int i = 0; i < BATCH; i++) {
    struct entry *entry = d->cut ? NULL : room(d);
    uint8_t *unit = entry == NULL ? scratch[d - directions] : (uint8_t *)(entry + 1);
    ssize_t length = read(d->from, unit, UNIT_MAX);
    if (length < 0 && errno == EINTR) continue;
    if (length < 0 && errno == EAGAIN) return false;
    if (length < 0) die("reading from the device");
    uint32_t wire = wire_bytes(unit, (size_t)length);
    add(&d->read, wire);
    if (d->cut) {
      draw(&d->random);
      add(&d->cut_off, wire);
    } else {
      accept_packet(d, entry, (size_t)length, wire, now_ns());
    }
  }
  return true;
}

/* Writes what is due, a batch at most; returns when the next packet is, UINT64_MAX if there is none. */
static uint64_t deliver(struct direction *d) {
  for (int i = 0; d->head != d->tail; i++) {
    struct entry *entry = (struct entry *)(d->ring + d->head);
    if (entry->length == WRAP) {
      d->head = 0;
      continue;
    }
    uint64_t now = now_ns();
    if (entry->due_ns > now || i >= BATCH) return entry->due_ns;
    ssize_t written = write(d->to, entry + 1, entry->length);
    if (written < 0 && errno == EINTR) continue;
    bool transient = errno == EAGAIN || errno == EIO || errno == EINVAL || errno == ENOMEM || errno == ENOBUFS;
    if (written < 0 && !transient) die("writing to the device");
    add(written < 0 ? &d->refused : &d->delivered, entry->wire);
    d->line.packets--;
    d->line.bytes -= entry->wire;
    d->late_sum_ns += now - entry->due_ns;
    if (now - entry->due_ns > d->late_max_ns) d->late_max_ns = now - entry->due_ns;
    d->head += sizeof *entry + ((entry->length + 7) & ~(size_t)7);
  }
  return UINT64_MAX;
}

static void hold(struct direction *d) {
  pthread_mutex_lock(&d->turnstile);
  pthread_mutex_lock(&d->lock);
  pthread_mutex_unlock(&d->turnstile);
}

static void *run(void *argument) {
  struct direction *d = argument;
  for (;;) {
    hold(d);
    uint64_t due = deliver(d);
    bool more = receive(d);
    if (due == UINT64_MAX) due = deliver(d); /* the first packet on an empty line */
    pthread_mutex_unlock(&d->lock);
    uint64_t now = now_ns();
    if (more || due <= now) continue;
    struct pollfd device = {.fd = d->from, .events = POLLIN};
    struct timespec rest = {(time_t)((due - now) / NS_PER_S), (long)((due - now) % NS_PER_S)};
    int ready = ppoll(&device, 1, due == UINT64_MAX ? NULL : &rest, NULL);
    if (ready < 0 && errno != EINTR) die("ppoll");
    if (ready > 0 && (device.revents & (POLLERR | POLLHUP | POLLNVAL)) != 0) {
      errno = ENODEV;
      die("the device is gone");
    }
  }
  return NULL;
}

/* A TUN device belongs to the namespace in which its descriptor was opened. */
static int open_device(const char *namespace, const char *name) {
  int place = open(namespace, O_RDONLY | O_CLOEXEC);
  if (place < 0) die("%s", namespace);
  if (setns(place, CLONE_NEWNET) != 0) die("setns %s", namespace);
  close(place);
  int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (device < 0) die("/dev/net/tun");
  struct ifreq request = {0};
  if (strlen(name) >= sizeof request.ifr_name) die("%s is too long a name", name);
  strcpy(request.ifr_name, name);
  request.ifr_flags = (short)(IFF_TUN | IFF_NO_PI | (offload ? IFF_VNET_HDR : 0));
  if (ioctl(device, TUNSETIFF, &request) != 0) die("TUNSETIFF %s", name);
  if (offload && ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) != 0) die("TUNSETOFFLOAD");
  return device;
}

static const char *change(const struct settings *set) {
  const char *why = unfit(set);
  if (why != NULL) return why;
  for (int i = 0; i < 2; i++) {
    struct direction *d = &directions[i];
    hold(d);
    d->set = *set;
    d->soft = ring_need(set);
    pthread_mutex_unlock(&d->lock);
  }
  return NULL;
}

static void cut(bool on) {
  for (int i = 0; i < 2; i++) {
    struct direction *d = &directions[i];
    hold(d);
    d->cut = on;
    if (on) {
      d->cut_off.packets += d->line.packets;
      d->cut_off.bytes += d->line.bytes;
      d->line = (struct count){0, 0};
      d->head = d->tail = 0;
      d->free_ns = 0;
      d->last_due_ns = 0;
    }
    pthread_mutex_unlock(&d->lock);
  }
}

static void print_count(const char *name, const struct count *count) {
  printf("\"%s\":{\"packets\":%" PRIu64 ",\"bytes\":%" PRIu64 "},", name, count->packets, count->bytes);
}

static void print_direction(const char *name, struct direction *d) {
  hold(d);
  printf("\"%s\":{", name);
  print_count("read", &d->read);
  print_count("delivered", &d->delivered);
  print_count("dropped", &d->dropped);
  print_count("lost", &d->lost);
  print_count("cut", &d->cut_off);
  print_count("overflow", &d->overflow);
  print_count("refused", &d->refused);
  print_count("onLine", &d->line);
  printf("\"queueSumNs\":%" PRIu64 ",\"queueMaxNs\":%" PRIu64 ",", d->queue_sum_ns, d->queue_max_ns);
  printf("\"lateSumNs\":%" PRIu64 ",\"lateMaxNs\":%" PRIu64 "}", d->late_sum_ns, d->late_max_ns);
  pthread_mutex_unlock(&d->lock);
}

static void command(const char *line) {
  struct settings set;
  if (strcmp(line, "stats\n") == 0) {
    printf("{\"atNs\":%" PRIu64 ",", now_ns());
    print_direction("aToB", &directions[0]);
    printf(",");
    print_direction("bToA", &directions[1]);
    printf("}\n");
  } else if (strcmp(line, "cut\n") == 0 || strcmp(line, "restore\n") == 0) {
    cut(line[0] == 'c');
    printf("ok\n");
  } else if (sscanf(line, "set %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64, &set.rate, &set.rtt_ns, &set.queue_ns,
                    &set.loss) == 4) {
    const char *why = change(&set);
    printf(why == NULL ? "ok\n" : "error %s\n", why);
  } else {
    printf("error no such command\n");
  }
  if (fflush(stdout) != 0) die("stdout");
}

static uint64_t number(const char *word) {
  char *end;
  errno = 0;
  uint64_t value = strtoull(word, &end, 10);
  if (errno != 0 || end == word || *end != '\0') {
    errno = EINVAL;
    die("%s", word);
  }
  return value;
}

static void start(struct direction *d, uint64_t seed) {
  d->random = seed;
  d->ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (d->ring == MAP_FAILED) die("mmap");
  if ((errno = pthread_mutex_init(&d->turnstile, NULL)) != 0 || (errno = pthread_mutex_init(&d->lock, NULL)) != 0)
    die("pthread_mutex_init");
}

int main(int count, char **words) {
  if (count != 10) {
    fprintf(stderr, "usage: link NAMESPACE_A NAMESPACE_B DEVICE OFFLOAD SEED RATE RTT QUEUE LOSS\n");
    return 2;
  }
  pid_t parent = getppid();
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) die("PR_SET_PDEATHSIG");
  if (getppid() != parent) return 1;
  if (prctl(PR_SET_TIMERSLACK, 1UL) != 0) die("PR_SET_TIMERSLACK"); /* threads inherit it */
  (void)setpriority(PRIO_PROCESS, 0, -20); /* the ends share the processors with us: without the right to it we are only later */
  offload = number(words[4]) != 0;
  uint64_t seed = number(words[5]);
  struct settings set = {number(words[6]), number(words[7]), number(words[8]), number(words[9])};
  int device[2] = {open_device(words[1], words[3]), open_device(words[2], words[3])};
  for (int i = 0; i < 2; i++) {
    directions[i].from = device[i];
    directions[i].to = device[1 - i];
    start(&directions[i], draw(&seed)); /* each direction has numbers of its own */
  }
  const char *why = change(&set);
  if (why != NULL) {
    fprintf(stderr, "link: %s\n", why);
    return 2;
  }
  for (int i = 0; i < 2; i++) {
    pthread_t thread;
    if ((errno = pthread_create(&thread, NULL, run, &directions[i])) != 0) die("pthread_create");
  }
  printf("ready\n");
  if (fflush(stdout) != 0) die("stdout");
  char line[LINE_MAX_BYTES];
  while (fgets(line, sizeof line, stdin) != NULL) command(line);
  return 0;
}
