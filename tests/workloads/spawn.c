/*
 * Two threads that start programs without pause, by posix_spawn, and now and then by a vfork whose child dawdles before it
 * ends: a parent in vfork stops only when its child does. Each child must end with its own exit status and say its number.
 */
#include "workload.h"
#include <spawn.h>
#include <sys/wait.h>

extern char **environ;
static char *self = "/proc/self/exe";
static _Atomic uint64_t started;

/* In a function of its own: parent and child share the frame. Neither may touch more than the arguments of a system call. */
__attribute__((noinline)) static pid_t dawdling_child(int status)
{
	const struct timespec t = span(10 * MS);
	pid_t child = vfork();
	if (child == 0) {
		syscall(SYS_nanosleep, &t, NULL);
		_exit(status);
	}
	return child;
}

static void *spawner(void *argument)
{
	uint64_t lane = (uint64_t)(uintptr_t)argument;
	for (uint64_t i = 0; goes_on(); i++) {
		pid_t child;
		int status;
		int expected = (int)(mix(i + lane) % 200);
		if (i % 20 == 19) {
			child = dawdling_child(expected);
			CHECK(child > 0, "vfork");
		} else {
			int ends[2];
			MUST(pipe2(ends, O_CLOEXEC));
			posix_spawn_file_actions_t actions;
			posix_spawn_file_actions_init(&actions);
			posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
			char number[16], code[16];
			snprintf(number, sizeof number, "%llu", (unsigned long long)i);
			snprintf(code, sizeof code, "%d", breaking("status") && i == 30 ? expected + 1 : expected);
			char *words[] = {"spawn", "child", number, code, NULL};
			int error = posix_spawn(&child, self, &actions, NULL, words, environ);
			errno = error;
			CHECK(error == 0, "posix_spawn");
			posix_spawn_file_actions_destroy(&actions);
			close(ends[1]);
			char said[32] = "";
			ssize_t length = read(ends[0], said, sizeof said - 1);
			CHECK(length > 0 && strtoull(said, NULL, 10) == i, "child %llu said '%s'", (unsigned long long)i, said);
			close(ends[0]);
		}
		CHECK(waitpid(child, &status, 0) == child, "waitpid of %d", child);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == expected, "child %llu ended with %#x in place of %d",
		      (unsigned long long)i, status, expected);
		started++;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "child")) {
		dprintf(1, "%s\n", argv[2]);
		return atoi(argv[3]);
	}
	begin(argc, argv);
	pthread_t threads[2];
	ready();
	for (uintptr_t i = 0; i < 2; i++)
		CHECK(pthread_create(&threads[i], NULL, spawner, (void *)(i * 1000003)) == 0, "set-up failed: pthread_create");
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	return finished("spawned=%llu", (unsigned long long)started);
}
