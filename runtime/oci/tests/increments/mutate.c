// mutate SEED OPERATIONS: changes its memory in every way there is, at random, for ever. OPERATIONS is a mask of what it may do.
// A call that fails where it would not without anybody's tracking ends it with status 1 and a word about it.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define REGIONS 40
#define BASE_PAGES 2048UL
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

enum kind { FREE, ANONYMOUS, FILE_PRIVATE, SHARED, MEMFD };

enum { PROTECTED = 1, GUARDED = 2 };

struct region {
    enum kind kind;
    char *at, *second;
    size_t pages;
    int fd;
    int closed; // not all of it can be written to: PROTECTED, GUARDED
    int split;  // may be more than one mapping, with which mremap does nothing
};

static struct region regions[REGIONS];
static uint64_t state;
static uint64_t mask;
static char *base;
static int depth;
static int children;
static char seed_text[32], mask_text[32], depth_text[8];

static uint64_t draw(uint64_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state >> 11) % below;
}

static void must(int ok, const char *what) {
    if (!ok) {
        fprintf(stderr, "mutate: %s: %s\n", what, strerror(errno));
        _exit(1);
    }
}

static struct region *vacant(void) {
    for (int i = 0; i < REGIONS; i++)
        if (regions[i].kind == FREE) return &regions[i];
    return NULL;
}

static struct region *any(int writable) {
    for (int tries = 0; tries < 20; tries++) {
        struct region *r = &regions[draw(REGIONS)];
        if (r->kind != FREE && r->pages && !(writable && r->closed)) return r;
    }
    return NULL;
}

static void drop(struct region *r) {
    must(munmap(r->at, r->pages * PAGE) == 0, "munmap");
    if (r->second) must(munmap(r->second, r->pages * PAGE) == 0, "munmap of a second mapping");
    if (r->fd >= 0) close(r->fd);
    memset(r, 0, sizeof *r);
}

static void scribble(char *at, size_t pages) {
    for (size_t n = 1 + draw(8); n; n--) {
        size_t page = draw(pages);
        switch (draw(4)) {
        case 0: memset(at + page * PAGE, 0, PAGE); break;
        case 1: at[page * PAGE + draw(PAGE)] = at[page * PAGE]; break;
        default: for (int i = 0; i < 16; i++) at[page * PAGE + draw(PAGE)] = (char)draw(256);
        }
    }
}

// A word of most pages in a row: what has changed is stored, and not the pages.
static void update(char *at, size_t pages) {
    size_t first = draw(pages), count = 40 + draw(200);
    for (size_t page = first; page < first + count && page < pages; page++)
        if (draw(8)) at[page * PAGE + draw(PAGE)] = (char)draw(256);
}

static void map_anonymous(void) {
    struct region *r = vacant();
    if (!r) return;
    r->pages = 1 + draw(64);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | (draw(4) ? 0 : MAP_POPULATE);
    r->at = mmap(NULL, r->pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    must(r->at != MAP_FAILED, "mmap");
    r->kind = ANONYMOUS;
    r->fd = -1;
}

static void map_again_in_place(void) {
    struct region *r = any(0);
    if (!r || r->kind != ANONYMOUS) return;
    char *at = mmap(r->at, r->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    must(at == r->at, "mmap in place");
    r->closed = r->split = 0;
    if (draw(2)) scribble(at, r->pages);
}

static void map_file(void) {
    struct region *r = vacant();
    if (!r) return;
    int fd = open("/proc/self/exe", O_RDONLY);
    must(fd >= 0, "open");
    r->pages = 8 + draw(32);
    r->at = mmap(NULL, r->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    must(r->at != MAP_FAILED, "mmap of a file");
    close(fd);
    r->kind = FILE_PRIVATE;
    r->fd = -1;
}

static void map_shared(void) {
    struct region *r = vacant();
    if (!r) return;
    r->pages = 1 + draw(16);
    r->fd = -1;
    if (draw(2)) {
        r->fd = memfd_create("mutate", 0);
        must(r->fd >= 0 && ftruncate(r->fd, (off_t)(r->pages * PAGE)) == 0, "memfd");
        r->second = mmap(NULL, r->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, 0);
        must(r->second != MAP_FAILED, "mmap of a memfd");
        r->kind = MEMFD;
    } else {
        r->kind = SHARED;
    }
    int anonymous = r->fd < 0 ? MAP_ANONYMOUS : 0;
    r->at = mmap(NULL, r->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | anonymous, r->fd, 0);
    must(r->at != MAP_FAILED, "mmap of shared memory");
}

static void unmap(void) {
    struct region *r = any(0);
    if (!r) return;
    if (r->second || r->pages < 4 || draw(2)) {
        drop(r);
        return;
    }
    // From the middle to the end.
    size_t keep = 1 + draw(r->pages - 2);
    must(munmap(r->at + keep * PAGE, (r->pages - keep) * PAGE) == 0, "munmap of a part");
    r->pages = keep;
}

static void resize(void) {
    struct region *r = any(1);
    if (!r || r->kind != ANONYMOUS || r->split) return;
    size_t pages = 1 + draw(96);
    char *at = mremap(r->at, r->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
    must(at != MAP_FAILED, "mremap");
    r->at = at;
    r->pages = pages;
    if (draw(2)) scribble(at, pages);
}

static void move(void) {
    struct region *r = any(1);
    if (!r || r->kind != ANONYMOUS || r->split) return;
    char *to = mmap(NULL, r->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(to != MAP_FAILED, "mmap of a place to move to");
    char *at = mremap(r->at, r->pages * PAGE, r->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    must(at == to, "mremap to a place");
    r->at = at;
}

static void protect(void) {
    struct region *r = any(0);
    if (!r) return;
    static const int kinds[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
    size_t first = draw(r->pages), count = 1 + draw(r->pages - first);
    must(mprotect(r->at + first * PAGE, count * PAGE, kinds[draw(3)]) == 0, "mprotect");
    r->closed |= PROTECTED;
    r->split = 1;
    if (draw(2)) {
        must(mprotect(r->at, r->pages * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect back");
        r->closed &= ~PROTECTED;
    }
}

static void advise(int advice) {
    struct region *r = any(1);
    if (!r || r->second || r->kind == SHARED) return;
    if (advice == MADV_FREE && r->kind != ANONYMOUS) return;
    size_t first = draw(r->pages), count = 1 + draw(r->pages - first);
    must(madvise(r->at + first * PAGE, count * PAGE, advice) == 0, "madvise");
    if (draw(2)) scribble(r->at, r->pages);
}

static void guard(void) {
    struct region *r = any(1);
    if (!r || r->kind != ANONYMOUS || r->pages < 3) return;
    size_t first = draw(r->pages), count = 1 + draw(r->pages - first);
    if (madvise(r->at + first * PAGE, count * PAGE, MADV_GUARD_INSTALL)) {
        must(errno == EINVAL, "madvise of a guard");
        return;
    }
    r->closed |= GUARDED;
    if (draw(2)) {
        must(madvise(r->at, r->pages * PAGE, MADV_GUARD_REMOVE) == 0, "removing a guard");
        r->closed &= ~GUARDED;
    }
}

static void look(void) {
    struct region *r = any(1);
    volatile char sum = 0;
    if (r)
        for (size_t page = 0; page < r->pages; page++) sum += r->at[page * PAGE];
}

static void receive(void) {
    struct region *r = any(1);
    if (!r) return;
    int fd = open("/dev/urandom", O_RDONLY);
    must(fd >= 0, "open /dev/urandom");
    must(read(fd, r->at, PAGE) == PAGE, "read into memory");
    close(fd);
}

static void write_shared(void) {
    struct region *r = any(1);
    if (!r || r->kind != MEMFD) return;
    uint64_t value = draw(UINT32_MAX);
    size_t page = draw(r->pages);
    if (draw(2))
        memcpy(r->second + page * PAGE + 8 * draw(500), &value, 8);
    else
        must(pwrite(r->fd, &value, 8, (off_t)(page * PAGE)) == 8, "pwrite");
}

static void poke(void) {
    // Another process's call writes: the mappings are the same in a child.
    struct region *r = any(1);
    if (!r || r->kind != ANONYMOUS) return;
    char bytes[64];
    memset(bytes, (int)draw(256), sizeof bytes);
    struct iovec from = {bytes, sizeof bytes}, to = {r->at + draw(r->pages) * PAGE, sizeof bytes};
    must(process_vm_writev(getpid(), &from, 1, &to, 1, 0) == sizeof bytes, "process_vm_writev");
}

static void grow_heap(void) {
    static long added;
    long pages = (long)draw(64) - 24;
    // Only what this has added, and no more than captures can follow.
    if (added + pages < 0 || added + pages > 1024) return;
    added += pages;
    if (pages < 0) {
        must(brk((char *)sbrk(0) + pages * (long)PAGE) == 0, "brk down");
        return;
    }
    char *at = sbrk(pages * (long)PAGE);
    must(at != (void *)-1, "brk");
    if (pages) scribble(at, (size_t)pages);
}

static void *writer(void *argument) {
    char *at = argument;
    for (int i = 0; i < 2000; i++) at[(i * 769) % (int)(BASE_PAGES * PAGE / 2)] = (char)i;
    return NULL;
}

static void start_thread(void) {
    static atomic_int running;
    if (running) return;
    pthread_t thread;
    must(pthread_create(&thread, NULL, writer, base) == 0, "pthread_create");
    must(pthread_join(thread, NULL) == 0, "pthread_join");
}

static void reserve(void) {
    struct region *r = vacant();
    if (!r) return;
    r->pages = 1 << 18;
    r->at = mmap(NULL, r->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(r->at != MAP_FAILED, "mmap of a reservation");
    r->kind = ANONYMOUS;
    r->fd = -1;
    r->closed = PROTECTED;
    r->split = 1;
    size_t first = draw(r->pages - 16);
    must(mprotect(r->at + first * PAGE, 16 * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect of a part");
    scribble(r->at + first * PAGE, 16);
    if (draw(3)) drop(r);
}

static void use_huge(void) {
    struct region *r = vacant();
    if (!r) return;
    r->pages = 1536;
    r->at = mmap(NULL, r->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(r->at != MAP_FAILED, "mmap for huge pages");
    r->kind = ANONYMOUS;
    r->fd = -1;
    madvise(r->at, r->pages * PAGE, MADV_HUGEPAGE);
    scribble(r->at, r->pages);
    if (draw(2)) drop(r);
}

static void deepen(size_t bytes) {
    char room[16384];
    memset(room, (int)draw(256), sizeof room);
    if (bytes > sizeof room) deepen(bytes - sizeof room);
    __asm__ volatile("" ::"r"(room) : "memory");
}

static void replace_program(void) {
    snprintf(seed_text, sizeof seed_text, "%llu", (unsigned long long)(draw(1u << 30) + 1));
    snprintf(depth_text, sizeof depth_text, "%d", depth);
    execl("/proc/self/exe", "mutate", seed_text, mask_text, depth_text, (char *)NULL);
    must(0, "exec");
}

static void run(long steps);

static void await_children(void) {
    while (wait(NULL) > 0) continue;
}

static void split(void) {
    pid_t ended;
    // The first one is the parent of all that have lost theirs, too.
    while ((ended = waitpid(-1, NULL, children < 3 ? WNOHANG : 0)) > 0)
        if (children > 0) children--;
    if (depth > 1 || children >= 3) return;
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child) {
        children++;
        return;
    }
    depth++;
    children = 0;
    state += (uint64_t)getpid() * 7919;
    run((long)draw(1000));
    if (mask & 1 << 20 && draw(2)) replace_program();
    await_children();
    _exit(0);
}

static void spawn(void) {
    pid_t child = vfork();
    if (child == 0) {
        execl("/proc/self/exe", "mutate", "0", (char *)NULL);
        _exit(2);
    }
    must(child > 0 && waitpid(child, NULL, 0) == child, "vfork");
}

static void step(void) {
    unsigned operation = (unsigned)draw(22);
    if (!(mask & 1ull << operation)) return;
    switch (operation) {
    case 0: map_anonymous(); break;
    case 1: unmap(); break;
    case 2: resize(); break;
    case 3: protect(); break;
    case 4: advise(MADV_DONTNEED); break;
    case 5: advise(MADV_FREE); break;
    case 6: guard(); break;
    case 7: { struct region *r = any(1); if (r) scribble(r->at, r->pages); break; }
    case 8: if (draw(4) == 0) update(base, BASE_PAGES); else scribble(base, BASE_PAGES); break;
    case 9: look(); break;
    case 10: receive(); break;
    case 11: if (draw(20) == 0) split(); break;
    case 12: if (draw(20) == 0) start_thread(); break;
    case 13: grow_heap(); break;
    case 14: map_shared(); break;
    case 15: write_shared(); break;
    case 16: map_file(); break;
    case 17: if (draw(20) == 0) reserve(); break;
    case 18: if (draw(20) == 0) use_huge(); break;
    case 19: deepen(draw(1 << 18)); break;
    case 20: if (draw(40) == 0) spawn(); break;
    case 21: switch (draw(3)) { case 0: move(); break; case 1: map_again_in_place(); break; default: poke(); } break;
    }
}

static void run(long steps) {
    for (long i = 0; steps < 0 || i < steps; i++) {
        step();
        // Not faster than a processor and its captures can follow.
        if (i % 16 == 0) nanosleep(&(struct timespec){0, 200000}, NULL);
    }
}

int main(int count, char **words) {
    if (count < 3) return 0;
    state = strtoull(words[1], NULL, 0) * 0x9e3779b97f4a7c15ull + 1;
    mask = strtoull(words[2], NULL, 0);
    snprintf(mask_text, sizeof mask_text, "%s", words[2]);
    depth = count > 3 ? atoi(words[3]) : 0;
    base = mmap(NULL, BASE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(base != MAP_FAILED, "mmap");
    for (size_t page = 0; page < BASE_PAGES; page++) memset(base + page * PAGE, (int)page, PAGE / 4);
    // The second half can't be compressed.
    for (size_t at = BASE_PAGES * PAGE / 2; at < BASE_PAGES * PAGE; at += 8) {
        uint64_t noise = (at + 1) * 0x9e3779b97f4a7c15ull;
        noise ^= noise >> 29;
        noise *= 0xbf58476d1ce4e5b9ull;
        memcpy(base + at, &noise, 8);
    }
    run(depth ? (long)draw(1000) : -1);
    await_children();
    return 0;
}
