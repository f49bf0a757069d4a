/*
 * Single pieces of kernel state, each set up and checked by a few lines.
 *
 *   state list                      every case: name, tab, flags, tab, what a save says if it refuses the case
 *   state run CASE [--spoil]        sets up, prints `ready`, waits for the file /finish, and checks
 *
 * A case says `OK` and exits 0, or says `differs: …` and exits 1. With --spoil it changes its own state after /finish is there
 * and before it checks, which shows that the check can fail.
 *
 * A file here is an area; each adds cases with STATE. Setup keeps what check needs in static variables: both run in the same
 * process, which has no other thread unless setup makes one.
 */
#ifndef STATE_H
#define STATE_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct state {
	const char *name;
	void (*setup)(void);
	void (*check)(void);
	/* Changes the state so that check must notice. */
	void (*spoil)(void);
	/* Needs all capabilities. */
	bool privileged;
	/* Needs a terminal as its standard streams. */
	bool terminal;
	/* A part of what a save says when it refuses this state; NULL where it is saved. */
	const char *refused;
	struct state *next;
};

void state_register(struct state *state);

/* STATE(name, .field = value…): NAME_setup, NAME_check and NAME_spoil are functions of the same file. */
#define STATE(id, ...) \
	static struct state id##_state = {.name = #id, .setup = id##_setup, .check = id##_check, .spoil = id##_spoil, ##__VA_ARGS__}; \
	__attribute__((constructor)) static void id##_register(void) { state_register(&id##_state); }

/* Says what differs and ends the process; the harness looks at the output of the first process only, so children exit with 1. */
__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...);

#define CHECK(condition, ...) do { if (!(condition)) fail(__VA_ARGS__); } while (0)
/* For calls whose failure is no difference, but without which nothing can be shown. */
#define MUST(call) ({ __auto_type r_ = (call); if ((long)r_ == -1) fail("failed: %s", #call); r_; })

/* A child that runs `body` until it returns its exit status. */
pid_t in_child(int (*body)(void));
/* Waits for a child, and fails unless it exits with `status`. */
void expect_exit(pid_t child, int status);
/* The directory of the file that ends the waiting; AT_FDCWD for the root. */
extern int finish_at;
/* True once the harness has asked for the end. */
bool finishing(void);
/* Sleeps in steps until `finishing`, whatever interrupts it. */
void until_finishing(void);
int64_t now_ns(clockid_t clock);
/* Content of a file (a file of /proc too) as a string in a static buffer of its own for each call site's use: copy it to keep it. */
const char *content(const char *path);

#endif
