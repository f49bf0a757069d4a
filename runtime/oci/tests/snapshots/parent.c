/* Keeps 24 MiB, all of which it changes again and again, and looks whether it has children, descriptors or time that are not its own.
 * Writes its rounds to /tmp/count, and what is wrong to /tmp/wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 6144, NOT_FORKED = 16 };

static uint64_t word(uint64_t page, uint64_t round) { return (page * 0x9e3779b97f4a7c15u) ^ (round * 0xbf58476d1ce4e5b9u); }

static void must(int right, const char *what) {
    if (right) return;
    FILE *file = fopen("/tmp/wrong", "a");
    fprintf(file, "%s: %s\n", what, strerror(errno));
    fclose(file);
    _exit(1);
}

/* All of a page, so that a page of another round can't pass for it. */
static void fill(uint64_t *at, uint64_t page, uint64_t round) {
    for (int i = 0; i < PAGE / 8; i++) at[i] = word(page, round) + (uint64_t)i;
}

static void check(const uint64_t *at, uint64_t page, uint64_t round) {
    for (int i = 0; i < PAGE / 8; i += 37) must(at[i] == word(page, round) + (uint64_t)i, "memory");
}

int main(void) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    char *memory = mmap(NULL, PAGES * (size_t)PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    char *apart = mmap(NULL, NOT_FORKED * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    char *wiped = mmap(NULL, NOT_FORKED * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    must(memory != MAP_FAILED && apart != MAP_FAILED && wiped != MAP_FAILED, "mmap");
    must(madvise(apart, NOT_FORKED * PAGE, MADV_DONTFORK) == 0, "MADV_DONTFORK");
    must(madvise(wiped, NOT_FORKED * PAGE, MADV_WIPEONFORK) == 0, "MADV_WIPEONFORK");
    for (uint64_t round = 1;; round++) {
        for (uint64_t page = 0; page < PAGES; page++) {
            uint64_t *at = (uint64_t *)(memory + page * PAGE);
            if (round > 1) check(at, page, round - 1);
            fill(at, page, round);
        }
        for (uint64_t page = 0; page < NOT_FORKED; page++) {
            uint64_t *one = (uint64_t *)(apart + page * PAGE), *other = (uint64_t *)(wiped + page * PAGE);
            if (round > 1) check(one, page, round - 1), check(other, page, round - 1);
            fill(one, page, round);
            fill(other, page, round);
        }
        must(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "there is a child");
        int ends[2];
        must(pipe(ends) == 0, "pipe");
        usleep(1000);
        close(ends[1]);
        struct pollfd end = {ends[0], POLLIN, 0};
        must(poll(&end, 1, 0) == 1 && (end.revents & POLLHUP), "somebody has the other end");
        close(ends[0]);
        char text[32];
        int length = snprintf(text, sizeof text, "%llu\n", (unsigned long long)round);
        int file = open("/tmp/count.new", O_WRONLY | O_CREAT | O_TRUNC, 0644);
        must(write(file, text, (size_t)length) == length, "write");
        close(file);
        must(rename("/tmp/count.new", "/tmp/count") == 0, "rename");
    }
}
