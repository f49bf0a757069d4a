#include "random.h"
#include "state.h"

static struct state *first;

void state_register(struct state *state)
{
	struct state **place = &first;
	while (*place && strcmp((*place)->name, state->name) < 0)
		place = &(*place)->next;
	if (*place && !strcmp((*place)->name, state->name))
		fail("two cases have the name %s", state->name);
	state->next = *place;
	*place = state;
}

void fail(const char *format, ...)
{
	char text[1024], line[1200];
	int saved = errno;
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	int length = snprintf(line, sizeof line, "differs: %s (errno %d %s)\n", text, saved, strerror(saved));
	ssize_t ignored = write(1, line, (size_t)length);
	(void)ignored;
	_exit(1);
}

pid_t in_child(int (*body)(void))
{
	pid_t child = MUST(fork());
	if (child == 0)
		_exit(body());
	return child;
}

void expect_exit(pid_t child, int status)
{
	int got;
	pid_t ended;
	while ((ended = waitpid(child, &got, 0)) == -1 && errno == EINTR)
		;
	CHECK(ended == child, "child %d can't be waited for", child);
	CHECK(WIFEXITED(got) && WEXITSTATUS(got) == status, "child %d ended with %#x, not with exit status %d", child, got, status);
}

int finish_at = AT_FDCWD;

bool finishing(void) { return faccessat(finish_at, finish_at == AT_FDCWD ? "/finish" : "finish", F_OK, 0) == 0; }

void until_finishing(void)
{
	while (!finishing()) {
		struct timespec step = {.tv_nsec = 5000000};
		nanosleep(&step, NULL);
	}
}

int64_t now_ns(clockid_t clock)
{
	struct timespec t;
	MUST(clock_gettime(clock, &t));
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

const char *content(const char *path)
{
	static char buffer[4][65536];
	static unsigned next;
	char *text = buffer[next++ % 4];
	int fd = MUST(open(path, O_RDONLY | O_CLOEXEC));
	size_t filled = 0;
	ssize_t count;
	while ((count = read(fd, text + filled, sizeof buffer[0] - 1 - filled)) > 0)
		filled += (size_t)count;
	CHECK(count == 0, "%s can't be read", path);
	text[filled] = 0;
	close(fd);
	return text;
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "list")) {
		for (struct state *state = first; state; state = state->next)
			printf("%s\t%s%s\t%s\n", state->name, state->privileged ? "p" : "", state->terminal ? "t" : "",
				state->refused ? state->refused : "");
		return 0;
	}
	if ((argc == 4 || argc == 5) && !strcmp(argv[1], "random"))
		return random_state(strtoull(argv[2], NULL, 10), (unsigned)strtoul(argv[3], NULL, 10), argc == 5 ? argv[4] : "");
	if (argc < 3 || argc > 4 || strcmp(argv[1], "run") || (argc == 4 && strcmp(argv[3], "--spoil"))) {
		fprintf(stderr, "usage: state list | state run CASE [--spoil] | state random SEED COUNT [SKIPPED,…]\n");
		return 2;
	}
	for (struct state *state = first; state; state = state->next) {
		if (strcmp(state->name, argv[2]))
			continue;
		state->setup();
		MUST(write(1, "ready\n", 6));
		until_finishing();
		if (argc == 4)
			state->spoil();
		state->check();
		MUST(write(1, "OK\n", 3));
		return 0;
	}
	fprintf(stderr, "no case %s\n", argv[2]);
	return 2;
}
