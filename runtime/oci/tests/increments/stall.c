// stall: fills memory at a fixed place and waits.
// stall PID: writes a page into the memory of such a process by process_vm_writev(2), and has that call stall in its middle: it has taken
// hold of the page, and what it copies from is not there yet. Says "stalled"; goes on at the end of its input; says "written".
// stall PID settle: has the kernel do on all processors what it has put off, so that what was freed lazily shows as such.
// stall PID lazy: has the kernel take away at once, in all of the process's private memory, what was freed lazily.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096UL
#define PLACE ((char *)0x200000000000)
#define PAGES 4096UL

static void must(int ok, const char *what) {
    if (!ok) {
        fprintf(stderr, "stall: %s: %s\n", what, strerror(errno));
        _exit(1);
    }
}

static pid_t target;
static char *source;

static void *write_there(void *nothing) {
    struct iovec from = {source, PAGE}, to = {PLACE + 7 * PAGE, PAGE};
    must(process_vm_writev(target, &from, 1, &to, 1, 0) == (ssize_t)PAGE, "process_vm_writev");
    return nothing;
}

static void drop_what_is_free(void) {
    char path[64], line[512];
    int fd = (int)syscall(SYS_pidfd_open, target, 0);
    must(fd >= 0, "pidfd_open");
    snprintf(path, sizeof path, "/proc/%d/maps", target);
    FILE *maps = fopen(path, "r");
    must(maps != NULL, "open of maps");
    while (fgets(line, sizeof line, maps)) {
        unsigned long start, end, inode;
        char rights[5];
        must(sscanf(line, "%lx-%lx %4s %*s %*s %lu", &start, &end, rights, &inode) == 4, "a line of maps");
        if (rights[3] != 'p' || inode) continue;
        struct iovec range = {(void *)start, end - start};
        // Not of all kinds of memory.
        syscall(SYS_process_madvise, fd, &range, 1, MADV_PAGEOUT, 0);
    }
    fclose(maps);
}

int main(int count, char **words) {
    if (count > 1) target = atoi(words[1]);
    if (count < 2 || target == 0) {
        char *memory = mmap(PLACE, PAGES * PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        must(memory == PLACE, "mmap");
        for (size_t page = 0; page < PAGES; page++) memset(memory + page * PAGE, 1 + (int)page % 255, PAGE);
        for (;;) pause();
    }
    if (count > 2 && strcmp(words[2], "settle") == 0) {
        // Moves nothing, and empties the lists that each processor keeps first.
        int node = 0, status;
        must(syscall(SYS_move_pages, 0, 0UL, NULL, &node, &status, 0) == 0, "move_pages");
        return 0;
    }
    if (count > 2) {
        drop_what_is_free();
        return 0;
    }
    int faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    must(faults >= 0, "userfaultfd");
    struct uffdio_api api = {.api = UFFD_API};
    must(ioctl(faults, UFFDIO_API, &api) == 0, "UFFDIO_API");
    source = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(source != MAP_FAILED, "mmap");
    struct uffdio_register range = {{(unsigned long)source, PAGE}, UFFDIO_REGISTER_MODE_MISSING, 0};
    must(ioctl(faults, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
    pthread_t thread;
    must(pthread_create(&thread, NULL, write_there, NULL) == 0, "pthread_create");
    struct uffd_msg fault;
    must(read(faults, &fault, sizeof fault) == sizeof fault, "read of a fault");
    puts("stalled");
    fflush(stdout);
    char byte;
    while (read(0, &byte, 1) > 0) continue;
    static char content[PAGE] __attribute__((aligned(4096)));
    memset(content, 0xee, PAGE);
    struct uffdio_copy copy = {(unsigned long)source, (unsigned long)content, PAGE, 0, 0};
    must(ioctl(faults, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
    must(pthread_join(thread, NULL) == 0, "pthread_join");
    puts("written");
    return 0;
}
