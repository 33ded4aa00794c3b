/*
 * The test guest's workload: writes numbered, checksummed records to its disk and reads earlier ones back.
 *
 * A record is one 4 KiB block, little-endian 32-bit words:
 *   0 magic "BFRE"   1 magic "CORD"   2 slot   3 sequence   4 hash of all other words   5..7 zero   8..1023 pseudo-random body
 * The whole block follows from (slot, sequence): test/lab/records.ts makes the same blocks on the host. The exact sequence
 * of every slot is kept in guest RAM, so that a stale block, a zero block and another slot's block are errors, not
 * only a torn one. A disk starts with sequence 0 in every slot: in raw mode the host wrote it; in ext4 mode the host did
 * (files exist), or this program does.
 *
 * Parameters, as NAME=VALUE words:
 *   bf.mode=ext4|raw   files on an ext4 file system, or slots from byte 0 of the disk (default raw)
 *   bf.disk=/dev/vda   bf.slots=N (default 4096)   bf.files=N (ext4: slots are spread over N files, default 1)
 *   bf.writes=PERCENT  share of turns that write, 0 to 100 (default 100); every turn reads one random slot back
 *   bf.rate=N          turns a second, 0 for as many as it can (default 0)
 *   bf.dirty=MIB       RAM that is rewritten all the time, and checked (default 0)
 *   bf.dirtyrate=MIBS  at this rate (default 8 MiB a second)
 *
 * Lines on the serial port, each written at once:
 *   READY slots=N mode=M
 *   HB n=COUNT rec=WRITTEN chk=READ err=BAD ram=BADPAGES slow=MICROSECONDS        every 10 ms, slow since the last one
 *   BAD slot=S want=SEQUENCE got=SEQUENCE kind=zero|stale|newer|misplaced|torn|garbage       the first BAD_LINES_MAX of them
 *   IOERR op=OP slot=S errno=E
 *   CHECKED slots=N bad=N digest=HEX                                              after key 'v'; then it goes on
 *   VERIFIED slots=N bad=N rec=WRITTEN chk=READ err=BAD ram=BADPAGES digest=HEX   after key 'q'; then it powers off
 *   FATAL why
 * digest is a hash of all slots' sequences: the host compares it with what it finds in the image.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum {
  BLOCK = 4096,
  WORDS = BLOCK / 4,
  BODY = 8,
  BATCH = 16, /* blocks read or written at once when all slots are filled or verified */
  SYNC_EVERY = 8,
  HEARTBEAT_MS = 10,
  BAD_LINES_MAX = 20,
  FILES_MAX = 64,
  LINE_MAX_BYTES = 256,
};

static const uint32_t MAGIC0 = 0x45524642, MAGIC1 = 0x44524f43; /* "BFRE" "CORD" */

static struct {
  char mode[8], disk[64];
  uint32_t slots, files, writes, rate, dirty, dirtyrate;
} options = {"raw", "/dev/vda", 4096, 1, 100, 0, 0, 8};

static int tty = 1;
static int descriptors[FILES_MAX];
static uint32_t *expected; /* sequence of every slot: the truth this disk is held against */
static uint32_t bad_lines;
static atomic_uint written, checked, errors, ram_errors, slowest_us;
static atomic_ullong io_started_us; /* 0: none under way */
static atomic_int key;

static void say(const char *format, ...) {
  char line[LINE_MAX_BYTES];
  va_list words;
  va_start(words, format);
  int length = vsnprintf(line, sizeof line - 1, format, words);
  va_end(words);
  if (length > (int)sizeof line - 2) length = sizeof line - 2;
  line[length++] = '\n';
  for (int done = 0; done < length;) {
    ssize_t n = write(tty, line + done, length - done);
    if (n <= 0) return;
    done += n;
  }
}

static void fatal(const char *what) {
  say("FATAL %s: %s", what, strerror(errno));
  reboot(RB_POWER_OFF);
  _exit(1);
}

static uint64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void sleep_until_us(uint64_t at) {
  struct timespec t = {at / 1000000, (at % 1000000) * 1000};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) {}
}

static uint32_t next(uint32_t *state) {
  uint32_t x = *state;
  x ^= x << 13;
  x ^= x >> 17;
  x ^= x << 5;
  return *state = x;
}

static uint32_t hash_words(const uint32_t *words, uint32_t count, uint32_t hash) {
  for (uint32_t i = 0; i < count; i++) hash = (hash ^ words[i]) * 0x01000193;
  return hash;
}

static uint32_t record_hash(const uint32_t *record) {
  uint32_t hash = hash_words(record, 4, 0x811c9dc5);
  return hash_words(record + 5, WORDS - 5, hash);
}

static void make_record(uint32_t *record, uint32_t slot, uint32_t sequence) {
  record[0] = MAGIC0;
  record[1] = MAGIC1;
  record[2] = slot;
  record[3] = sequence;
  record[5] = record[6] = record[7] = 0;
  uint32_t state = (slot * 0x9e3779b1) ^ (sequence * 0x85ebca6b) ^ 0x2545f491;
  if (state == 0) state = 1;
  for (uint32_t i = BODY; i < WORDS; i++) record[i] = next(&state);
  record[4] = record_hash(record);
}

static void report_bad(const uint32_t *record, uint32_t slot, uint32_t want) {
  atomic_fetch_add(&errors, 1);
  if (bad_lines++ >= BAD_LINES_MAX) return;
  const char *kind;
  uint32_t any = 0;
  for (uint32_t i = 0; i < WORDS; i++) any |= record[i];
  if (any == 0) kind = "zero";
  else if (record[0] != MAGIC0 || record[1] != MAGIC1) kind = "garbage";
  else if (record_hash(record) != record[4]) kind = "torn";
  else if (record[2] != slot) kind = "misplaced";
  else kind = record[3] < want ? "stale" : "newer";
  say("BAD slot=%u want=%u got=%u kind=%s", slot, want, record[3], kind);
}

/* True if `record` holds exactly what was last written to `slot`. */
static int check_record(const uint32_t *record, uint32_t slot) {
  static uint32_t want[WORDS];
  make_record(want, slot, expected[slot]);
  if (memcmp(record, want, BLOCK) == 0) return 1;
  report_bad(record, slot, expected[slot]);
  return 0;
}

static void io_begin(void) { atomic_store(&io_started_us, now_us()); }

static void io_end(void) {
  uint32_t took = now_us() - atomic_load(&io_started_us);
  atomic_store(&io_started_us, 0);
  uint32_t slowest = atomic_load(&slowest_us);
  while (took > slowest && !atomic_compare_exchange_weak(&slowest_us, &slowest, took)) {}
}

/* Reads or writes `count` slots of one file from `slot` on (slots of a file are `files` apart). False on an error. */
static int transfer(int writing, uint32_t slot, void *buffer, uint32_t count) {
  int fd = descriptors[slot % options.files];
  off_t at = (off_t)(slot / options.files) * BLOCK;
  size_t bytes = (size_t)count * BLOCK;
  io_begin();
  ssize_t n = writing ? pwrite(fd, buffer, bytes, at) : pread(fd, buffer, bytes, at);
  int error = errno;
  io_end();
  if (n == (ssize_t)bytes) return 1;
  atomic_fetch_add(&errors, 1);
  if (bad_lines++ < BAD_LINES_MAX) say("IOERR op=%s slot=%u errno=%d", writing ? "write" : "read", slot, n < 0 ? error : 0);
  return 0;
}

static void sync_file(uint32_t slot) {
  io_begin();
  int failed = fdatasync(descriptors[slot % options.files]);
  int error = errno;
  io_end();
  if (!failed) return;
  atomic_fetch_add(&errors, 1);
  if (bad_lines++ < BAD_LINES_MAX) say("IOERR op=sync slot=%u errno=%d", slot, error);
}

/* Calls for every batch of neighbouring slots of one file: first slot, number of slots. */
static uint32_t each_batch(uint32_t (*visit)(uint32_t slot, uint32_t count, uint32_t *buffer), uint32_t *buffer) {
  uint32_t bad = 0;
  for (uint32_t file = 0; file < options.files; file++) {
    uint32_t in_file = (options.slots - file + options.files - 1) / options.files;
    for (uint32_t i = 0; i < in_file; i += BATCH) {
      uint32_t count = in_file - i < BATCH ? in_file - i : BATCH;
      bad += visit(i * options.files + file, count, buffer);
    }
  }
  return bad;
}

static uint32_t fill_batch(uint32_t slot, uint32_t count, uint32_t *buffer) {
  for (uint32_t i = 0; i < count; i++) make_record(buffer + i * WORDS, slot + i * options.files, 0);
  return transfer(1, slot, buffer, count) ? 0 : count;
}

static uint32_t verify_batch(uint32_t slot, uint32_t count, uint32_t *buffer) {
  memset(buffer, 0, (size_t)count * BLOCK);
  if (!transfer(0, slot, buffer, count)) return count;
  uint32_t bad = 0;
  for (uint32_t i = 0; i < count; i++) bad += !check_record(buffer + i * WORDS, slot + i * options.files);
  return bad;
}

static void *heartbeat(void *unused) {
  (void)unused;
  /* Ahead of the workload: a gap between two lines is then a stop of the machine, not a busy guest. */
  struct sched_param first = {.sched_priority = 1};
  sched_setscheduler(0, SCHED_FIFO, &first);
  uint64_t at = now_us();
  for (uint32_t n = 0;; n++) {
    uint32_t slow = atomic_exchange(&slowest_us, 0);
    uint64_t started = atomic_load(&io_started_us), now = now_us();
    if (started != 0 && now > started && now - started > slow) slow = now - started;
    say("HB n=%u rec=%u chk=%u err=%u ram=%u slow=%u", n, atomic_load(&written), atomic_load(&checked), atomic_load(&errors),
        atomic_load(&ram_errors), slow);
    at += HEARTBEAT_MS * 1000;
    if (at < now) at = now + HEARTBEAT_MS * 1000; /* the machine stood still: no burst afterwards */
    sleep_until_us(at);
  }
  return NULL;
}

/*
 * Rewrites RAM page by page, and checks that each still holds what was put there: a hypervisor that loses dirty RAM pages
 * is told from a disk that loses blocks.
 */
static void *dirty_ram(void *unused) {
  (void)unused;
  const uint32_t pages = options.dirty * 256;
  uint32_t *ram = mmap(NULL, (size_t)pages * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (ram == MAP_FAILED) fatal("RAM for bf.dirty");
  uint64_t at = now_us();
  const uint32_t per_tick = (options.dirtyrate * 256 + 99) / 100;
  for (uint32_t round = 0, page = 0;;) {
    for (uint32_t i = 0; i < per_tick; i++) {
      uint32_t *words = ram + (size_t)page * WORDS;
      uint32_t was = round == 0 ? 0 : page ^ (round * 0x9e3779b1);
      if (words[0] != was || words[WORDS - 1] != was) atomic_fetch_add(&ram_errors, 1);
      words[0] = words[WORDS - 1] = page ^ ((round + 1) * 0x9e3779b1);
      if (++page == pages) page = 0, round++;
    }
    at += 10000;
    uint64_t now = now_us();
    if (at < now) at = now;
    sleep_until_us(at);
  }
  return NULL;
}

static void *read_keys(void *unused) {
  (void)unused;
  for (char c;;) {
    ssize_t n = read(tty, &c, 1);
    if (n == 1 && (c == 'v' || c == 'q')) atomic_store(&key, c);
    if (n <= 0) usleep(100000);
  }
  return NULL;
}

static void open_tty(void) {
  int fd = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
  if (fd < 0) return;
  struct termios raw;
  if (tcgetattr(fd, &raw) == 0) {
    cfmakeraw(&raw);
    tcsetattr(fd, TCSANOW, &raw);
  }
  tty = fd;
}

static void parse(int count, char **words) {
  for (int i = 1; i < count; i++) {
    char *value = strchr(words[i], '=');
    if (strncmp(words[i], "bf.", 3) != 0 || value == NULL) continue;
    *value++ = 0;
    const char *name = words[i] + 3;
    uint32_t number = strtoul(value, NULL, 10);
    if (!strcmp(name, "mode")) snprintf(options.mode, sizeof options.mode, "%s", value);
    else if (!strcmp(name, "disk")) snprintf(options.disk, sizeof options.disk, "%s", value);
    else if (!strcmp(name, "slots")) options.slots = number;
    else if (!strcmp(name, "files")) options.files = number;
    else if (!strcmp(name, "writes")) options.writes = number;
    else if (!strcmp(name, "rate")) options.rate = number;
    else if (!strcmp(name, "dirty")) options.dirty = number;
    else if (!strcmp(name, "dirtyrate")) options.dirtyrate = number;
    else say("FATAL unknown parameter bf.%s", name);
  }
  errno = EINVAL;
  if (options.slots == 0 || options.files == 0 || options.files > FILES_MAX || options.slots < options.files) fatal("bf.slots, bf.files");
}

static void open_disk(uint32_t *buffer) {
  if (!strcmp(options.mode, "raw")) {
    options.files = 1;
    descriptors[0] = open(options.disk, O_RDWR | O_DIRECT);
    if (descriptors[0] < 0) fatal(options.disk);
    if (lseek(descriptors[0], 0, SEEK_END) < (off_t)options.slots * BLOCK) fatal("disk too small for bf.slots");
    return;
  }
  if (mount(options.disk, "/mnt", "ext4", 0, NULL) != 0) fatal("mount");
  int missing = 0;
  for (uint32_t i = 0; i < options.files; i++) {
    char path[32];
    snprintf(path, sizeof path, "/mnt/records%u", i);
    struct stat info;
    if (stat(path, &info) != 0) missing = 1;
    descriptors[i] = open(path, O_RDWR | O_CREAT | O_DIRECT, 0644);
    if (descriptors[i] < 0) fatal(path);
  }
  if (!missing) return;
  if (each_batch(fill_batch, buffer) != 0) fatal("first records");
  for (uint32_t i = 0; i < options.files; i++) sync_file(i);
}

static void start_thread(void *(*run)(void *)) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, run, NULL) != 0) fatal("thread");
}

static void verify_all(uint32_t *buffer, int last) {
  uint32_t bad = each_batch(verify_batch, buffer);
  uint32_t digest = hash_words(expected, options.slots, 0x811c9dc5);
  if (!last) {
    say("CHECKED slots=%u bad=%u digest=%08x", options.slots, bad, digest);
    return;
  }
  for (uint32_t i = 0; i < options.files; i++) sync_file(i);
  for (uint32_t i = 0; i < options.files; i++) close(descriptors[i]);
  if (!strcmp(options.mode, "ext4") && umount("/mnt") != 0) say("FATAL umount: %s", strerror(errno));
  say("VERIFIED slots=%u bad=%u rec=%u chk=%u err=%u ram=%u digest=%08x", options.slots, bad, atomic_load(&written),
      atomic_load(&checked), atomic_load(&errors), atomic_load(&ram_errors), digest);
  tcdrain(tty);
  sync();
  reboot(RB_POWER_OFF);
}

static void turn(uint32_t *buffer, uint32_t *random, uint32_t *unsynced) {
  if (options.writes > 0 && next(random) % 100 < options.writes) {
    uint32_t slot = next(random) % options.slots;
    make_record(buffer, slot, expected[slot] + 1);
    if (transfer(1, slot, buffer, 1)) {
      expected[slot]++;
      atomic_fetch_add(&written, 1);
    }
    if (++*unsynced % SYNC_EVERY == 0) sync_file(slot);
  }
  uint32_t slot = next(random) % options.slots;
  if (!transfer(0, slot, buffer, 1)) return;
  check_record(buffer, slot);
  atomic_fetch_add(&checked, 1);
}

int main(int count, char **words) {
  open_tty();
  parse(count, words);
  uint32_t *buffer = aligned_alloc(BLOCK, (size_t)BATCH * BLOCK);
  expected = calloc(options.slots, sizeof *expected);
  if (buffer == NULL || expected == NULL) fatal("memory");
  open_disk(buffer);
  start_thread(read_keys);
  start_thread(heartbeat);
  if (options.dirty > 0) start_thread(dirty_ram);
  say("READY slots=%u mode=%s", options.slots, options.mode);

  uint32_t random = 0x1234567, unsynced = 0;
  uint64_t at = now_us();
  for (;;) {
    int pressed = atomic_exchange(&key, 0);
    if (pressed) verify_all(buffer, pressed == 'q');
    turn(buffer, &random, &unsynced);
    if (options.rate == 0) continue;
    at += 1000000 / options.rate;
    uint64_t now = now_us();
    if (at < now) at = now;
    sleep_until_us(at);
  }
}
