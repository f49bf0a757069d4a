/* Pseudo-terminals both of whose sides are in the container. */
#include "state.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <asm/termbits.h>

#ifndef TIOCPKT_FLUSHREAD
#define TIOCPKT_FLUSHREAD 1
#define TIOCPKT_STOP 4
#define TIOCPKT_DOSTOP 32
#endif
#ifndef TIOCGPTPEER
#define TIOCGPTPEER 0x5441
#endif

struct pty {
	int master, slave, number;
	char path[32];
};

static void make_master(struct pty *pty)
{
	pty->master = MUST(open("/dev/ptmx", O_RDWR | O_NOCTTY));
	MUST(ioctl(pty->master, TIOCGPTN, &pty->number));
	MUST(ioctl(pty->master, TIOCSPTLCK, &(int){0}));
	snprintf(pty->path, sizeof pty->path, "/dev/pts/%d", pty->number);
	pty->slave = -1;
}

static void make_pty(struct pty *pty)
{
	make_master(pty);
	pty->slave = MUST(open(pty->path, O_RDWR | O_NOCTTY));
}

static struct termios2 get(int fd)
{
	struct termios2 settings;
	MUST(ioctl(fd, TCGETS2, &settings));
	return settings;
}

static void set(int fd, struct termios2 settings) { MUST(ioctl(fd, TCSETS2, &settings)); }

static void make_raw(int fd)
{
	struct termios2 s = get(fd);
	s.c_iflag = 0;
	s.c_oflag = 0;
	s.c_lflag = 0;
	s.c_cc[VMIN] = 1;
	s.c_cc[VTIME] = 0;
	set(fd, s);
}

static void without_echo(int fd)
{
	struct termios2 s = get(fd);
	s.c_lflag &= ~(unsigned)ECHO;
	set(fd, s);
}

static int polled(int fd, short events)
{
	struct pollfd p = {.fd = fd, .events = events};
	MUST(poll(&p, 1, 0));
	return p.revents;
}

/* Reads what is expected, or fails; waits for a second at most. */
static void expect(int fd, const char *text, size_t length)
{
	char buffer[65536];
	size_t got = 0;
	while (got < length) {
		struct pollfd p = {.fd = fd, .events = POLLIN};
		CHECK(MUST(poll(&p, 1, 1000)) == 1, "%zu bytes came, not %zu", got, length);
		ssize_t count = read(fd, buffer + got, length - got);
		CHECK(count > 0, "a read returned %zd after %zu bytes of %zu", count, got, length);
		got += (size_t)count;
	}
	CHECK(!memcmp(buffer, text, length), "another text came: %.*s", (int)got, buffer);
}

static void expect_text(int fd, const char *text) { expect(fd, text, strlen(text)); }

/* One read returns exactly this. */
static void expect_read(int fd, const char *text)
{
	char buffer[8192];
	struct pollfd p = {.fd = fd, .events = POLLIN};
	CHECK(MUST(poll(&p, 1, 1000)) == 1, "nothing came, not %s", text);
	ssize_t count = MUST(read(fd, buffer, sizeof buffer));
	CHECK((size_t)count == strlen(text) && !memcmp(buffer, text, strlen(text)), "a read returned %zd bytes: %.*s", count, (int)count, buffer);
}

static void expect_nothing(int fd) { CHECK(!(polled(fd, POLLIN) & POLLIN), "there is more to read"); }

static void type(struct pty *pty, const char *text) { MUST(write(pty->master, text, strlen(text))); }

/* Input arrives by a worker of the kernel's. */
static void settle(void) { usleep(20000); }

/* A child that calls functions of ours when asked. */
struct worker {
	pid_t pid;
	int to, from;
};

static void work(int from, int to)
{
	int (*body)(void);
	while (read(from, &body, sizeof body) == sizeof body) {
		int result = body();
		if (write(to, &result, sizeof result) != sizeof result)
			break;
	}
	_exit(0);
}

static void hire(struct worker *worker, void (*first)(void))
{
	int there[2], back[2];
	MUST(pipe2(there, O_CLOEXEC));
	MUST(pipe2(back, O_CLOEXEC));
	worker->pid = MUST(fork());
	if (worker->pid == 0) {
		close(there[1]);
		close(back[0]);
		if (first)
			first();
		work(there[0], back[1]);
	}
	close(there[0]);
	close(back[1]);
	worker->to = there[1];
	worker->from = back[0];
}

static void order(struct worker *worker, int (*body)(void)) { MUST(write(worker->to, &body, sizeof body)); }

static int answer(struct worker *worker)
{
	int result;
	struct pollfd p = {.fd = worker->from, .events = POLLIN};
	CHECK(MUST(poll(&p, 1, 2000)) == 1, "a child does not answer");
	CHECK(read(worker->from, &result, sizeof result) == sizeof result, "a child has ended");
	return result;
}

static int ask(struct worker *worker, int (*body)(void))
{
	order(worker, body);
	return answer(worker);
}

static struct pty p;

/* --- settings --- */

static struct termios2 wanted;

static void same_settings(void)
{
	struct termios2 now = get(p.slave);
	CHECK(now.c_iflag == wanted.c_iflag, "c_iflag is %#x, not %#x", now.c_iflag, wanted.c_iflag);
	CHECK(now.c_oflag == wanted.c_oflag, "c_oflag is %#x, not %#x", now.c_oflag, wanted.c_oflag);
	CHECK(now.c_cflag == wanted.c_cflag, "c_cflag is %#x, not %#x", now.c_cflag, wanted.c_cflag);
	CHECK(now.c_lflag == wanted.c_lflag, "c_lflag is %#x, not %#x", now.c_lflag, wanted.c_lflag);
	CHECK(!memcmp(now.c_cc, wanted.c_cc, sizeof now.c_cc), "a special character is another");
	CHECK(now.c_line == wanted.c_line, "the line discipline is another");
	CHECK(now.c_ispeed == wanted.c_ispeed && now.c_ospeed == wanted.c_ospeed, "the speeds are %u and %u, not %u and %u", now.c_ispeed, now.c_ospeed, wanted.c_ispeed, wanted.c_ospeed);
}

static void spoil_settings(void)
{
	struct termios2 s = get(p.slave);
	s.c_cc[VKILL] ^= 1;
	set(p.slave, s);
}

static void pty_default_settings_setup(void) { make_pty(&p); wanted = get(p.slave); }
static void pty_default_settings_check(void) { same_settings(); }
static void pty_default_settings_spoil(void) { spoil_settings(); }
STATE(pty_default_settings)

static void pty_raw_settings_setup(void) { make_pty(&p); make_raw(p.slave); wanted = get(p.slave); }
static void pty_raw_settings_check(void) { same_settings(); }
static void pty_raw_settings_spoil(void) { spoil_settings(); }
STATE(pty_raw_settings)

static void pty_odd_settings_setup(void)
{
	make_pty(&p);
	struct termios2 s = get(p.slave);
	s.c_iflag = ISTRIP | INLCR | IXANY | IXON | IUTF8 | IMAXBEL | PARMRK;
	s.c_oflag = OPOST | OCRNL | ONOCR | ONLRET | XTABS;
	s.c_lflag = ICANON | ECHOE | ECHOK | ECHONL | NOFLSH | TOSTOP | ECHOCTL | ECHOPRT | IEXTEN;
	s.c_cflag |= CLOCAL | HUPCL | CSTOPB | PARODD;
	for (unsigned i = 0; i < NCCS; i++)
		s.c_cc[i] = (cc_t)(100 + i);
	s.c_cc[VEOL2] = 0;
	set(p.slave, s);
	wanted = get(p.slave);
}
static void pty_odd_settings_check(void) { same_settings(); }
static void pty_odd_settings_spoil(void) { spoil_settings(); }
STATE(pty_odd_settings)

static void pty_speeds_setup(void)
{
	make_pty(&p);
	struct termios2 s = get(p.slave);
	s.c_cflag = (s.c_cflag & ~(unsigned)(CBAUD | CIBAUD)) | BOTHER | BOTHER << IBSHIFT;
	s.c_ispeed = 12345;
	s.c_ospeed = 67890;
	set(p.slave, s);
	wanted = get(p.slave);
	CHECK(wanted.c_ospeed == 67890, "no such speed");
}
static void pty_speeds_check(void) { same_settings(); }
static void pty_speeds_spoil(void)
{
	struct termios2 s = get(p.slave);
	s.c_ospeed = 1;
	set(p.slave, s);
}
STATE(pty_speeds)

static void pty_extproc_setup(void)
{
	make_pty(&p);
	struct termios2 s = get(p.slave);
	s.c_lflag |= EXTPROC;
	set(p.slave, s);
	type(&p, "abc\n");
	settle();
	wanted = get(p.slave);
}
static void pty_extproc_check(void) { same_settings(); expect_read(p.slave, "abc\n"); }
static void pty_extproc_spoil(void) { spoil_settings(); }
STATE(pty_extproc)

static void pty_size_setup(void)
{
	make_pty(&p);
	MUST(ioctl(p.master, TIOCSWINSZ, &(struct winsize){.ws_row = 33, .ws_col = 77, .ws_xpixel = 770, .ws_ypixel = 660}));
}
static void pty_size_check(void)
{
	struct winsize size[2];
	MUST(ioctl(p.master, TIOCGWINSZ, &size[0]));
	MUST(ioctl(p.slave, TIOCGWINSZ, &size[1]));
	for (int i = 0; i < 2; i++)
		CHECK(size[i].ws_row == 33 && size[i].ws_col == 77 && size[i].ws_xpixel == 770 && size[i].ws_ypixel == 660, "the size is %d x %d", size[i].ws_row, size[i].ws_col);
}
static void pty_size_spoil(void) { MUST(ioctl(p.slave, TIOCSWINSZ, &(struct winsize){.ws_row = 34, .ws_col = 77})); }
STATE(pty_size)

static void pty_owner_setup(void)
{
	make_pty(&p);
	MUST(fchown(p.slave, 1000, 7));
	MUST(fchmod(p.slave, 0611));
}
static void pty_owner_check(void)
{
	struct stat s;
	MUST(stat(p.path, &s));
	CHECK(s.st_uid == 1000 && s.st_gid == 7 && (s.st_mode & 07777) == 0611, "%d:%d %o", s.st_uid, s.st_gid, s.st_mode);
}
static void pty_owner_spoil(void) { MUST(chmod(p.path, 0600)); }
STATE(pty_owner)

static void pty_exclusive_setup(void) { make_pty(&p); MUST(ioctl(p.slave, TIOCEXCL)); }
static void pty_exclusive_check(void)
{
	int exclusive;
	MUST(ioctl(p.slave, TIOCGEXCL, &exclusive));
	CHECK(exclusive, "it is not exclusive");
	CHECK(open(p.path, O_RDWR | O_NOCTTY) == -1 && errno == EBUSY, "it can be opened");
}
static void pty_exclusive_spoil(void) { MUST(ioctl(p.slave, TIOCNXCL)); }
STATE(pty_exclusive)

/* --- numbers, and who has what open --- */

static struct pty many[6];
static int closed_slave;

static void pty_numbers_setup(void)
{
	for (int i = 0; i < 6; i++)
		make_pty(&many[i]);
	for (int i = 0; i < 6; i += 2) {
		close(many[i].slave);
		close(many[i].master);
	}
}
static void pty_numbers_check(void)
{
	for (int i = 1; i < 6; i += 2) {
		int number;
		MUST(ioctl(many[i].master, TIOCGPTN, &number));
		CHECK(number == many[i].number, "terminal %d is %d", many[i].number, number);
		char name[64] = "";
		MUST(ttyname_r(many[i].slave, name, sizeof name) ? -1 : 0);
		CHECK(!strcmp(name, many[i].path), "the name is %s", name);
		int again = MUST(open(many[i].path, O_RDWR | O_NOCTTY));
		make_raw(again);
		MUST(write(many[i].master, "x", 1));
		expect_text(again, "x");
		close(again);
	}
	struct pty next;
	make_pty(&next);
	CHECK(next.number == many[0].number, "the next terminal is %d", next.number);
}
static void pty_numbers_spoil(void)
{
	MUST(dup2(many[3].master, many[1].master));
}
STATE(pty_numbers)

static void pty_never_opened_setup(void) { make_master(&p); MUST(ioctl(p.master, TIOCSWINSZ, &(struct winsize){.ws_row = 9, .ws_col = 8})); }
static void pty_never_opened_check(void)
{
	struct winsize size;
	CHECK(polled(p.master, POLLIN | POLLHUP) == 0, "the master is ready, or hung up");
	MUST(ioctl(p.master, TIOCGWINSZ, &size));
	CHECK(size.ws_row == 9 && size.ws_col == 8, "the size is another");
	p.slave = MUST(open(p.path, O_RDWR | O_NOCTTY));
	type(&p, "a\n");
	expect_read(p.slave, "a\n");
}
static void pty_never_opened_spoil(void) { close(MUST(open(p.path, O_RDWR | O_NOCTTY))); }
STATE(pty_never_opened)

static void pty_locked_setup(void)
{
	p.master = MUST(open("/dev/ptmx", O_RDWR | O_NOCTTY));
	MUST(ioctl(p.master, TIOCGPTN, &p.number));
	snprintf(p.path, sizeof p.path, "/dev/pts/%d", p.number);
}
static void pty_locked_check(void)
{
	int locked;
	MUST(ioctl(p.master, TIOCGPTLCK, &locked));
	CHECK(locked, "it is not locked");
	CHECK(open(p.path, O_RDWR | O_NOCTTY) == -1 && errno == EIO, "it can be opened");
	MUST(ioctl(p.master, TIOCSPTLCK, &(int){0}));
	MUST(open(p.path, O_RDWR | O_NOCTTY));
}
static void pty_locked_spoil(void) { MUST(ioctl(p.master, TIOCSPTLCK, &(int){0})); }
STATE(pty_locked)

static void pty_locked_open_setup(void) { make_pty(&p); MUST(ioctl(p.master, TIOCSPTLCK, &(int){1})); }
static void pty_locked_open_check(void)
{
	type(&p, "still\n");
	expect_read(p.slave, "still\n");
	/* An attempt breaks the terminal for good. */
	CHECK(open(p.path, O_RDWR | O_NOCTTY) == -1 && errno == EIO, "it can be opened");
}
static void pty_locked_open_spoil(void) { MUST(ioctl(p.master, TIOCSPTLCK, &(int){0})); }
STATE(pty_locked_open)

static void pty_slave_closed_setup(void) { make_pty(&p); close(p.slave); }
static void pty_slave_closed_check(void)
{
	char byte;
	CHECK(polled(p.master, POLLIN) & POLLHUP, "the master is not hung up");
	CHECK(read(p.master, &byte, 1) == -1 && errno == EIO, "it can be read");
	p.slave = MUST(open(p.path, O_RDWR | O_NOCTTY));
	CHECK(!(polled(p.master, POLLIN) & POLLHUP), "the master stays hung up");
	type(&p, "again\n");
	expect_read(p.slave, "again\n");
}
static void pty_slave_closed_spoil(void) { p.slave = MUST(open(p.path, O_RDWR | O_NOCTTY)); }
STATE(pty_slave_closed)

static void pty_slave_closed_output_setup(void)
{
	make_pty(&p);
	MUST(write(p.slave, "last words\n", 11));
	settle();
	close(p.slave);
}
static void pty_slave_closed_output_check(void)
{
	char byte;
	expect_read(p.master, "last words\r\n");
	CHECK(read(p.master, &byte, 1) == -1 && errno == EIO, "there is more");
}
static void pty_slave_closed_output_spoil(void) { expect_text(p.master, "last"); }
STATE(pty_slave_closed_output)

static void pty_slave_closed_input_setup(void)
{
	make_pty(&p);
	without_echo(p.slave);
	type(&p, "unread\nhalf");
	settle();
	close(p.slave);
}
static void pty_slave_closed_input_check(void)
{
	p.slave = MUST(open(p.path, O_RDWR | O_NOCTTY | O_NONBLOCK));
	expect_read(p.slave, "unread\n");
	type(&p, " done\n");
	expect_read(p.slave, "half done\n");
}
static void pty_slave_closed_input_spoil(void) { p.slave = MUST(open(p.path, O_RDWR | O_NOCTTY | O_NONBLOCK)); expect_text(p.slave, "unr"); }
STATE(pty_slave_closed_input)

static void pty_master_closed_setup(void) { make_pty(&p); close(p.master); }
static void pty_master_closed_check(void)
{
	char byte;
	CHECK(polled(p.slave, POLLIN | POLLOUT) & POLLHUP, "it is not hung up");
	CHECK(read(p.slave, &byte, 1) == 0, "it is not at its end");
	CHECK(write(p.slave, "x", 1) == -1 && errno == EIO, "it can be written to");
	CHECK(access(p.path, F_OK) == -1, "it still has a name");
	struct stat s;
	struct pty next;
	MUST(fstat(p.slave, &s));
	CHECK(s.st_rdev == (dev_t)(136 << 8 | p.number), "its number is %#lx", s.st_rdev);
	make_pty(&next);
	CHECK(next.number != p.number, "its number is free");
}
static void pty_master_closed_spoil(void) { struct pty other; make_pty(&other); MUST(dup2(other.slave, p.slave)); }
STATE(pty_master_closed)

static void pty_closed_in_between_setup(void)
{
	for (int i = 0; i < 3; i++)
		make_pty(&many[i]);
	close(many[1].master);
	closed_slave = MUST(dup(many[1].slave));
}
static void pty_closed_in_between_check(void)
{
	char byte;
	CHECK(read(closed_slave, &byte, 1) == 0, "it is not at its end");
	type(&many[2], "third\n");
	expect_read(many[2].slave, "third\n");
	type(&many[0], "first\n");
	expect_read(many[0].slave, "first\n");
}
static void pty_closed_in_between_spoil(void) { MUST(dup2(many[0].slave, many[2].slave)); }
STATE(pty_closed_in_between)

static int again[3];

static void pty_descriptions_setup(void)
{
	make_pty(&p);
	again[0] = MUST(dup(p.slave));
	again[1] = MUST(open(p.path, O_RDONLY | O_NOCTTY | O_NONBLOCK));
	again[2] = MUST(open(p.path, O_WRONLY | O_NOCTTY | O_APPEND));
	MUST(fcntl(p.master, F_SETFL, O_RDWR | O_NONBLOCK));
	MUST(fcntl(again[0], F_SETFD, FD_CLOEXEC));
}
static void pty_descriptions_check(void)
{
	CHECK((MUST(fcntl(again[1], F_GETFL)) & (O_ACCMODE | O_NONBLOCK)) == (O_RDONLY | O_NONBLOCK), "the second one's flags are others");
	CHECK((MUST(fcntl(again[2], F_GETFL)) & (O_ACCMODE | O_APPEND | O_NONBLOCK)) == (O_WRONLY | O_APPEND), "the third one's flags are others");
	CHECK((MUST(fcntl(p.slave, F_GETFL)) & (O_ACCMODE | O_NONBLOCK)) == O_RDWR, "the first one's flags are others");
	CHECK(MUST(fcntl(p.master, F_GETFL)) & O_NONBLOCK, "the master blocks");
	CHECK(MUST(fcntl(again[0], F_GETFD)) == FD_CLOEXEC && MUST(fcntl(p.slave, F_GETFD)) == 0, "the flags of descriptors are others");
	MUST(fcntl(again[0], F_SETFL, O_RDWR | O_NONBLOCK));
	CHECK(MUST(fcntl(p.slave, F_GETFL)) & O_NONBLOCK, "duplicates are apart");
	char byte;
	CHECK(read(p.master, &byte, 1) == -1 && errno == EAGAIN, "the master is not empty");
}
static void pty_descriptions_spoil(void) { MUST(fcntl(again[1], F_SETFL, 0)); }
STATE(pty_descriptions)

static void pty_peer_setup(void) { make_master(&p); p.slave = MUST(ioctl(p.master, TIOCGPTPEER, O_RDWR | O_NOCTTY)); make_raw(p.slave); }
static void pty_peer_check(void) { type(&p, "peer"); expect_text(p.slave, "peer"); MUST(write(p.slave, "back", 4)); expect_text(p.master, "back"); }
static void pty_peer_spoil(void) { type(&p, "no"); settle(); }
STATE(pty_peer)

/* --- queues --- */

static void pty_raw_input_setup(void) { make_pty(&p); make_raw(p.slave); MUST(write(p.master, "a\0b\n\r\x03\x04\x11\x13\x7f\xff", 11)); settle(); }
static void pty_raw_input_check(void) { expect(p.slave, "a\0b\n\r\x03\x04\x11\x13\x7f\xff", 11); expect_nothing(p.slave); expect_nothing(p.master); }
static void pty_raw_input_spoil(void) { expect_text(p.slave, "a"); }
STATE(pty_raw_input)

static void pty_lines_setup(void) { make_pty(&p); without_echo(p.slave); type(&p, "first\nsecond line\n\nfourth\n"); settle(); }
static void pty_lines_check(void)
{
	expect_read(p.slave, "first\n");
	expect_read(p.slave, "second line\n");
	expect_read(p.slave, "\n");
	expect_read(p.slave, "fourth\n");
	expect_nothing(p.slave);
	expect_nothing(p.master);
}
static void pty_lines_spoil(void) { expect_read(p.slave, "first\n"); }
STATE(pty_lines)

static void pty_echoed_setup(void) { make_pty(&p); type(&p, "ab\x02\bc\ndef"); settle(); }
static void pty_echoed_check(void)
{
	expect_read(p.master, "ab^B^Hc\r\ndef");
	type(&p, "\x7fg\n");
	expect_read(p.slave, "ab\x02\bc\n");
	expect_read(p.slave, "deg\n");
	expect_text(p.master, "\b \bg\r\n");
}
static void pty_echoed_spoil(void) { expect_text(p.master, "ab"); }
STATE(pty_echoed)

static void pty_half_read_line_setup(void) { make_pty(&p); without_echo(p.slave); type(&p, "0123456789\nnext\n"); settle(); expect_text(p.slave, "0123"); }
static void pty_half_read_line_check(void) { expect_read(p.slave, "456789\n"); expect_read(p.slave, "next\n"); expect_nothing(p.slave); }
static void pty_half_read_line_spoil(void) { expect_text(p.slave, "4"); }
STATE(pty_half_read_line)

static void pty_unfinished_line_setup(void) { make_pty(&p); type(&p, "whole\nhal"); settle(); expect_text(p.master, "whole\r\nhal"); }
static void pty_unfinished_line_check(void)
{
	expect_read(p.slave, "whole\n");
	expect_nothing(p.slave);
	expect_nothing(p.master);
	type(&p, "\x7f\x7funt\n");
	expect_read(p.slave, "hunt\n");
	expect_text(p.master, "\b \b\b \bunt\r\n");
}
static void pty_unfinished_line_spoil(void) { type(&p, "x"); settle(); }
STATE(pty_unfinished_line)

static void pty_ends_of_file_setup(void) { make_pty(&p); without_echo(p.slave); type(&p, "ab\x04\x04" "cd\n\x04"); settle(); }
static void pty_ends_of_file_check(void)
{
	expect_read(p.slave, "ab");
	expect_read(p.slave, "");
	expect_read(p.slave, "cd\n");
	expect_read(p.slave, "");
	expect_nothing(p.slave);
}
static void pty_ends_of_file_spoil(void) { expect_read(p.slave, "ab"); }
STATE(pty_ends_of_file)

static void pty_other_line_ends_setup(void)
{
	make_pty(&p);
	struct termios2 s = get(p.slave);
	s.c_lflag &= ~(unsigned)ECHO;
	s.c_cc[VEOL] = ';';
	s.c_cc[VEOL2] = '.';
	set(p.slave, s);
	type(&p, "one;two.three\nfo;ur");
	settle();
}
static void pty_other_line_ends_check(void)
{
	expect_read(p.slave, "one;");
	expect_read(p.slave, "two.");
	expect_read(p.slave, "three\n");
	expect_read(p.slave, "fo;");
	expect_nothing(p.slave);
	type(&p, ".");
	expect_read(p.slave, "ur.");
}
static void pty_other_line_ends_spoil(void) { expect_read(p.slave, "one;"); }
STATE(pty_other_line_ends)

static void pty_quoted_setup(void) { make_pty(&p); without_echo(p.slave); type(&p, "a\x16\x03" "b\x16\n" "c\x16\x04\x16\x13" "d\ne\x16\x7f"); settle(); }
static void pty_quoted_check(void)
{
	expect_read(p.slave, "a\x03" "b\nc\x04\x13" "d\n");
	type(&p, "\n");
	expect_read(p.slave, "e\x7f\n");
	expect_nothing(p.slave);
}
static void pty_quoted_spoil(void) { expect_text(p.slave, "a"); }
STATE(pty_quoted)

static void pty_upper_case_setup(void)
{
	make_pty(&p);
	struct termios2 s = get(p.slave);
	s.c_lflag &= ~(unsigned)ECHO;
	s.c_iflag |= ISTRIP | INLCR;
	s.c_iflag &= ~(unsigned)ICRNL;
	set(p.slave, s);
	/* What arrives was changed once, and is not changed again. */
	type(&p, "\xc1\xc2\n\x04");
	settle();
}
static void pty_upper_case_check(void) { expect_read(p.slave, "AB\r"); expect_nothing(p.slave); }
static void pty_upper_case_spoil(void) { expect_text(p.slave, "A"); }
STATE(pty_upper_case)

static void pty_minimum_setup(void)
{
	make_pty(&p);
	make_raw(p.slave);
	struct termios2 s = get(p.slave);
	s.c_cc[VMIN] = 10;
	s.c_cc[VTIME] = 3;
	set(p.slave, s);
	type(&p, "12345");
	settle();
	wanted = s;
}
static void pty_minimum_check(void) { same_settings(); int count; MUST(ioctl(p.slave, FIONREAD, &count)); CHECK(count == 5, "%d bytes wait", count); expect_read(p.slave, "12345"); }
static void pty_minimum_spoil(void) { type(&p, "6"); settle(); }
STATE(pty_minimum)

static void pty_output_setup(void) { make_pty(&p); MUST(write(p.slave, "one\ntwo\tx\n", 10)); settle(); }
static void pty_output_check(void) { expect_read(p.master, "one\r\ntwo\tx\r\n"); expect_nothing(p.master); MUST(write(p.slave, "y", 1)); expect_text(p.master, "y"); }
static void pty_output_spoil(void) { expect_text(p.master, "one"); }
STATE(pty_output)

static char pattern[9000];

static void make_pattern(void)
{
	for (size_t i = 0; i < sizeof pattern; i++)
		pattern[i] = (char)('a' + i * 7 % 23 + i / 1000);
}

static void pty_much_output_setup(void) { make_pty(&p); make_raw(p.slave); make_pattern(); CHECK(write(p.slave, pattern, sizeof pattern) == sizeof pattern, "it does not fit"); settle(); }
static void pty_much_output_check(void) { expect(p.master, pattern, sizeof pattern); expect_nothing(p.master); }
static void pty_much_output_spoil(void) { expect_text(p.master, "ah"); }
STATE(pty_much_output)

static void pty_much_input_setup(void) { make_pty(&p); make_raw(p.slave); make_pattern(); CHECK(write(p.master, pattern, sizeof pattern) == sizeof pattern, "it does not fit"); settle(); }
static void pty_much_input_check(void) { expect(p.slave, pattern, sizeof pattern); expect_nothing(p.slave); expect_nothing(p.master); }
static void pty_much_input_spoil(void) { expect_text(p.slave, "ah"); }
STATE(pty_much_input)

static void pty_both_ways_setup(void) { make_pty(&p); make_raw(p.slave); type(&p, "to the slave"); MUST(write(p.slave, "to the master", 13)); settle(); }
static void pty_both_ways_check(void) { expect_read(p.slave, "to the slave"); expect_read(p.master, "to the master"); }
static void pty_both_ways_spoil(void) { type(&p, "!"); settle(); }
STATE(pty_both_ways)

static void pty_many_lines_setup(void)
{
	make_pty(&p);
	without_echo(p.slave);
	char line[1000];
	memset(line, 'l', sizeof line);
	line[999] = '\n';
	for (int i = 0; i < 8; i++)
		MUST(write(p.master, line, sizeof line));
	settle();
}
static void pty_many_lines_check(void)
{
	char line[2000];
	for (int i = 0; i < 8; i++)
		CHECK(read(p.slave, line, sizeof line) == 1000 && line[0] == 'l' && line[998] == 'l', "line %d is another", i);
	expect_nothing(p.slave);
	expect_nothing(p.master);
}
static void pty_many_lines_spoil(void) { expect_text(p.slave, "l"); }
STATE(pty_many_lines)

/* Of what waits behind a full queue nothing has been echoed. */
static void pty_many_lines_echo_setup(void)
{
	char line[500];
	make_pty(&p);
	memset(line, 'e', sizeof line);
	line[499] = '\n';
	for (int i = 0; i < 12; i++)
		MUST(write(p.master, line, sizeof line));
	settle();
}
static void pty_many_lines_echo_check(void)
{
	char line[2000];
	for (int i = 0; i < 12; i++)
		CHECK(read(p.slave, line, sizeof line) == 500, "line %d is another", i);
	size_t echoed = 0;
	settle();
	while (polled(p.master, POLLIN) & POLLIN) {
		echoed += (size_t)MUST(read(p.master, line, sizeof line));
		settle();
	}
	CHECK(echoed == 12 * 501, "%zu bytes are echoed", echoed);
}
static void pty_many_lines_echo_spoil(void) { expect_text(p.master, "e"); }
STATE(pty_many_lines_echo)

static void pty_stopped_by_character_setup(void) { make_pty(&p); type(&p, "\x13"); settle(); }
static void pty_stopped_by_character_check(void)
{
	CHECK(!(polled(p.slave, POLLOUT) & POLLOUT), "output goes on");
	type(&p, "\x11");
	settle();
	CHECK(polled(p.slave, POLLOUT) & POLLOUT, "output does not go on");
	MUST(write(p.slave, "on", 2));
	expect_read(p.master, "on");
}
static void pty_stopped_by_character_spoil(void) { type(&p, "\x11"); settle(); }
STATE(pty_stopped_by_character)

static void pty_stopped_by_call_setup(void) { make_pty(&p); MUST(write(p.slave, "before", 6)); MUST(ioctl(p.slave, TCXONC, 0)); }
static void pty_stopped_by_call_check(void)
{
	CHECK(!(polled(p.slave, POLLOUT) & POLLOUT), "output goes on");
	type(&p, "\x11");
	settle();
	CHECK(!(polled(p.slave, POLLOUT) & POLLOUT), "a character starts it");
	MUST(ioctl(p.slave, TCXONC, 1));
	MUST(write(p.slave, " and after", 10));
	settle();
	expect_text(p.master, "before and after");
}
static void pty_stopped_by_call_spoil(void) { MUST(ioctl(p.slave, TCXONC, 1)); }
STATE(pty_stopped_by_call)

static void pty_packet_setup(void) { make_pty(&p); MUST(ioctl(p.master, TIOCPKT, &(int){1})); MUST(write(p.slave, "data", 4)); settle(); }
static void pty_packet_check(void)
{
	char buffer[16];
	int packet;
	MUST(ioctl(p.master, TIOCGPKT, &packet));
	CHECK(packet, "it is not in packet mode");
	CHECK(!(polled(p.master, POLLPRI) & POLLPRI), "there is an event");
	CHECK(MUST(read(p.master, buffer, sizeof buffer)) == 5 && !memcmp(buffer, "\0data", 5), "it reads other data");
	MUST(ioctl(p.slave, TCFLSH, 0));
	CHECK(MUST(read(p.master, buffer, sizeof buffer)) == 1 && buffer[0] == TIOCPKT_FLUSHREAD, "it does not tell of an event");
}
static void pty_packet_spoil(void) { MUST(ioctl(p.master, TIOCPKT, &(int){0})); }
STATE(pty_packet)

static void pty_packet_event_setup(void)
{
	make_pty(&p);
	without_echo(p.slave);
	MUST(ioctl(p.master, TIOCPKT, &(int){1}));
	MUST(ioctl(p.slave, TCFLSH, 0));
	MUST(ioctl(p.slave, TCXONC, 0));
	type(&p, "typed\n");
	settle();
}
static void pty_packet_event_check(void)
{
	char buffer[16];
	CHECK(polled(p.master, POLLPRI) & POLLPRI, "there is no event");
	CHECK(MUST(read(p.master, buffer, sizeof buffer)) == 1, "an event comes with data");
	CHECK(buffer[0] == (TIOCPKT_FLUSHREAD | TIOCPKT_STOP), "the event is %#x", buffer[0]);
	expect_read(p.slave, "typed\n");
}
static void pty_packet_event_spoil(void) { char byte; MUST(read(p.master, &byte, 1)); }
STATE(pty_packet_event)

static void pty_packet_flow_setup(void)
{
	make_pty(&p);
	MUST(ioctl(p.master, TIOCPKT, &(int){1}));
	struct termios2 s = get(p.slave);
	s.c_iflag &= ~(unsigned)IXON;
	set(p.slave, s);
	s.c_iflag |= IXON;
	set(p.slave, s);
}
static void pty_packet_flow_check(void)
{
	char buffer[16];
	CHECK(polled(p.master, POLLPRI) & POLLPRI, "there is no event");
	CHECK(MUST(read(p.master, buffer, sizeof buffer)) == 1 && buffer[0] == TIOCPKT_DOSTOP, "the event is %#x", buffer[0]);
}
static void pty_packet_flow_spoil(void) { char byte; MUST(read(p.master, &byte, 1)); }
STATE(pty_packet_flow)

static int watch;

static void pty_epoll_setup(void)
{
	make_pty(&p);
	watch = MUST(epoll_create1(0));
	MUST(epoll_ctl(watch, EPOLL_CTL_ADD, p.master, &(struct epoll_event){.events = EPOLLIN, .data.u32 = 5}));
	MUST(epoll_ctl(watch, EPOLL_CTL_ADD, p.slave, &(struct epoll_event){.events = EPOLLIN | EPOLLET, .data.u32 = 6}));
}
static void pty_epoll_check(void)
{
	struct epoll_event event[2];
	CHECK(MUST(epoll_wait(watch, event, 2, 0)) == 0, "something is ready");
	MUST(write(p.slave, "x", 1));
	CHECK(MUST(epoll_wait(watch, event, 2, 1000)) == 1 && event[0].data.u32 == 5, "the master is not ready");
}
static void pty_epoll_spoil(void) { MUST(epoll_ctl(watch, EPOLL_CTL_DEL, p.master, NULL)); }
STATE(pty_epoll)

/* --- blocked processes --- */

static struct worker w, v;

static int read_line(void)
{
	char line[64];
	ssize_t count = read(p.slave, line, sizeof line);
	return count == 6 && !memcmp(line, "hello\n", 6) ? 0 : 1;
}
static void pty_blocked_reader_setup(void) { make_pty(&p); hire(&w, NULL); order(&w, read_line); settle(); }
static void pty_blocked_reader_check(void) { type(&p, "hello\n"); CHECK(answer(&w) == 0, "it has read something else"); expect_text(p.master, "hello\r\n"); }
static void pty_blocked_reader_spoil(void) { type(&p, "x"); }
STATE(pty_blocked_reader)

static int write_much(void)
{
	static char much[200000];
	for (size_t i = 0; i < sizeof much; i++)
		much[i] = (char)('0' + i % 61);
	for (size_t done = 0; done < sizeof much;) {
		ssize_t count = write(p.slave, much + done, sizeof much - done);
		if (count <= 0)
			return 1;
		done += (size_t)count;
	}
	return 0;
}
static void pty_blocked_writer_setup(void) { make_pty(&p); make_raw(p.slave); hire(&w, NULL); order(&w, write_much); usleep(100000); }
static void pty_blocked_writer_check(void)
{
	for (size_t i = 0; i < 200000;) {
		char buffer[4096];
		struct pollfd poller = {.fd = p.master, .events = POLLIN};
		CHECK(MUST(poll(&poller, 1, 2000)) == 1, "only %zu bytes came", i);
		ssize_t count = MUST(read(p.master, buffer, sizeof buffer));
		for (ssize_t j = 0; j < count; j++, i++)
			CHECK(buffer[j] == (char)('0' + i % 61), "byte %zu is another", i);
	}
	CHECK(answer(&w) == 0, "it could not write");
}
static void pty_blocked_writer_spoil(void) { expect_text(p.master, "0"); }
STATE(pty_blocked_writer)

/* --- sessions --- */

static void lead(void)
{
	MUST(setsid());
	MUST(ioctl(p.slave, TIOCSCTTY, 0));
}

static int is_controlled(void)
{
	int fd = open("/dev/tty", O_RDWR);
	if (fd == -1)
		return 1;
	unsigned device;
	MUST(ioctl(fd, TIOCGDEV, &device));
	close(fd);
	if ((int)(device & 0xff) != p.number)
		return 2;
	int group, session;
	MUST(ioctl(p.slave, TIOCGPGRP, &group));
	MUST(ioctl(p.slave, TIOCGSID, &session));
	return session == getsid(0) && group == getpgrp() ? 0 : 3;
}
static int give_up(void) { return ioctl(p.slave, TIOCNOTTY); }

static void pty_session_setup(void) { make_pty(&p); hire(&w, lead); CHECK(ask(&w, is_controlled) == 0, "no terminal"); }
static void pty_session_check(void)
{
	CHECK(ask(&w, is_controlled) == 0, "it is not the child's terminal");
	type(&p, "\x03");
	int status;
	CHECK(waitpid(w.pid, &status, 0) == w.pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGINT, "^C does not interrupt it");
}
static void pty_session_spoil(void) { signal(SIGHUP, SIG_IGN); kill(w.pid, SIGKILL); }
STATE(pty_session)

static void lead_without_master(void) { close(p.master); lead(); }
static void pty_hang_up_setup(void) { make_pty(&p); hire(&w, lead_without_master); CHECK(ask(&w, is_controlled) == 0, "no terminal"); }
static void pty_hang_up_check(void)
{
	int status;
	close(p.master);
	CHECK(waitpid(w.pid, &status, 0) == w.pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGHUP, "its end is not told");
}
static void pty_hang_up_spoil(void) { kill(w.pid, SIGKILL); }
STATE(pty_hang_up)

static void pty_two_sessions_setup(void)
{
	static struct pty other;
	make_pty(&other);
	make_pty(&p);
	hire(&w, lead);
	CHECK(ask(&w, is_controlled) == 0, "no terminal");
	struct pty first = p;
	p = other;
	hire(&v, lead);
	CHECK(ask(&v, is_controlled) == 0, "no terminal");
	many[0] = p;
	p = first;
}
static void pty_two_sessions_check(void)
{
	CHECK(ask(&w, is_controlled) == 0, "it is not the first child's terminal");
	CHECK(ask(&v, is_controlled) == 0, "it is not the second child's terminal");
}
static void pty_two_sessions_spoil(void) { CHECK(ask(&v, give_up) == 0, "spoil"); }
STATE(pty_two_sessions)

static int held;
static int open_by_name(void) { held = open("/dev/tty", O_RDWR | O_NONBLOCK); return held == -1; }
static int write_held(void)
{
	struct stat s;
	MUST(fstat(held, &s));
	if (s.st_rdev != 0x500 || !(fcntl(held, F_GETFL) & O_NONBLOCK))
		return 1;
	return write(held, "named", 5) == 5 ? 0 : 2;
}
static void pty_dev_tty_setup(void) { make_pty(&p); hire(&w, lead); CHECK(ask(&w, open_by_name) == 0, "no /dev/tty"); }
static void pty_dev_tty_check(void) { CHECK(ask(&w, write_held) == 0, "/dev/tty is another"); expect_text(p.master, "named"); }
static int close_held(void) { return dup2(p.slave, held) == -1; }
static void pty_dev_tty_spoil(void) { ask(&w, close_held); }
STATE(pty_dev_tty)

static int only_dev_tty(void) { if (open_by_name()) return 1; close(p.slave); close(p.master); return 0; }
static void pty_only_dev_tty_setup(void) { make_pty(&p); hire(&w, lead); CHECK(ask(&w, only_dev_tty) == 0, "no /dev/tty"); close(p.slave); }
static void pty_only_dev_tty_check(void) { CHECK(!(polled(p.master, POLLIN) & POLLHUP), "it is hung up"); CHECK(ask(&w, write_held) == 0, "/dev/tty is another"); expect_text(p.master, "named"); }
static int drop_held(void) { return close(held); }
static void pty_only_dev_tty_spoil(void) { ask(&w, drop_held); }
STATE(pty_only_dev_tty)

/* A member without the terminal: born before the leader had it. */
static pid_t early;
static int early_pipe[2];
static int early_body(void)
{
	char byte;
	if (read(early_pipe[0], &byte, 1) != 1)
		return 9;
	int fd = open("/dev/tty", O_RDWR);
	return fd == -1 && errno == ENXIO ? 0 : 1;
}
static void lead_late(void)
{
	MUST(setsid());
	early = in_child(early_body);
	MUST(ioctl(p.slave, TIOCSCTTY, 0));
}
static int wait_early(void) { int status; return waitpid(early, &status, 0) == early && status == 0 ? 0 : 1; }
static void pty_member_without_setup(void) { make_pty(&p); MUST(pipe(early_pipe)); hire(&w, lead_late); CHECK(ask(&w, is_controlled) == 0, "no terminal"); }
static void pty_member_without_check(void)
{
	CHECK(ask(&w, is_controlled) == 0, "it is not the child's terminal");
	MUST(write(early_pipe[1], "x", 1));
	CHECK(ask(&w, wait_early) == 0, "the grandchild has a terminal");
}
static void pty_member_without_spoil(void) { ask(&w, give_up); }
STATE(pty_member_without)

static int has_none(void) { int fd = open("/dev/tty", O_RDWR); int error = errno; close(fd); return fd == -1 && error == ENXIO ? 0 : 1; }
static void lead_and_give_up(void) { signal(SIGHUP, SIG_IGN); lead(); MUST(ioctl(p.slave, TIOCNOTTY)); }
static int take(void) { return ioctl(p.slave, TIOCSCTTY, 0); }
static void pty_given_up_setup(void) { make_pty(&p); hire(&w, lead_and_give_up); CHECK(ask(&w, has_none) == 0, "it has one"); }
static void pty_given_up_check(void) { CHECK(ask(&w, has_none) == 0, "it has a terminal"); CHECK(ask(&w, take) == 0 && ask(&w, is_controlled) == 0, "it can't have it again"); }
static void pty_given_up_spoil(void) { ask(&w, take); }
STATE(pty_given_up)

/* A shell's jobs: the leader, one group in the foreground and one in the background. */
static struct worker front, back;

static void own_group(void) { signal(SIGTTOU, SIG_DFL); MUST(setpgid(0, 0)); }
static void lead_jobs(void) { lead(); signal(SIGTTOU, SIG_IGN); }
static int make_front(void)
{
	hire(&front, own_group);
	setpgid(front.pid, front.pid);
	MUST(ioctl(p.slave, TIOCSPGRP, &front.pid));
	return front.pid;
}
static int make_back(void)
{
	hire(&back, own_group);
	setpgid(back.pid, back.pid);
	return back.pid;
}
static int foreground(void) { int group; MUST(ioctl(p.slave, TIOCGPGRP, &group)); return group; }
static int take_back(void) { int group = getpgrp(); return ioctl(p.slave, TIOCSPGRP, &group); }
static int front_pid, back_pid;

static void pty_foreground_setup(void) { make_pty(&p); hire(&w, lead_jobs); front_pid = ask(&w, make_front); back_pid = ask(&w, make_back); }
static int end_of_front(void) { int status; return waitpid(front.pid, &status, 0) == front.pid && WIFSIGNALED(status) ? WTERMSIG(status) : -1; }
static void pty_foreground_check(void)
{
	CHECK(ask(&w, foreground) == front_pid, "another group is in the foreground");
	int group;
	MUST(ioctl(p.master, TIOCGPGRP, &group));
	CHECK(group == front_pid, "the master sees the group %d", group);
	type(&p, "\x1c");
	CHECK(ask(&w, end_of_front) == SIGQUIT, "^\\ does not reach it");
	CHECK(kill(back_pid, 0) == 0, "the background is gone");
}
static void pty_foreground_spoil(void) { ask(&w, take_back); }
STATE(pty_foreground)

/* The foreground group's leader has ended; another member lives. */
static int front_member_body(void) { while (pause()) ; return 0; }
static int make_leaderless(void)
{
	pid_t leader = MUST(fork());
	if (leader == 0) {
		MUST(setpgid(0, 0));
		usleep(50000);
		_exit(0);
	}
	setpgid(leader, leader);
	early = in_child(front_member_body);
	MUST(setpgid(early, leader));
	MUST(ioctl(p.slave, TIOCSPGRP, &leader));
	int status;
	waitpid(leader, &status, 0);
	return leader;
}
static int end_of_early(void) { int status; return waitpid(early, &status, 0) == early && WIFSIGNALED(status) ? WTERMSIG(status) : -1; }
static void pty_leaderless_foreground_setup(void) { make_pty(&p); hire(&w, lead_jobs); front_pid = ask(&w, make_leaderless); }
static void pty_leaderless_foreground_check(void)
{
	CHECK(ask(&w, foreground) == front_pid, "another group is in the foreground");
	type(&p, "\x03");
	CHECK(ask(&w, end_of_early) == SIGINT, "^C does not reach it");
}
static void pty_leaderless_foreground_spoil(void) { ask(&w, take_back); }
STATE(pty_leaderless_foreground)

static int until_stopped(void) { siginfo_t info; return waitid(P_PID, (id_t)back.pid, &info, WSTOPPED | WNOWAIT); }
static int read_in_back(void) { order(&back, read_line); return until_stopped(); }
static int stopped_by(void)
{
	siginfo_t info = {0};
	if (waitid(P_PID, (id_t)back.pid, &info, WSTOPPED | WNOHANG) || info.si_pid == 0)
		return 0;
	return info.si_status;
}
static int back_to_front(void) { MUST(ioctl(p.slave, TIOCSPGRP, &back.pid)); return kill(-back.pid, SIGCONT); }
static int back_answer(void) { return answer(&back); }
static void pty_background_reader_setup(void) { make_pty(&p); hire(&w, lead_jobs); back_pid = ask(&w, make_back); ask(&w, read_in_back); }
static void pty_background_reader_check(void)
{
	CHECK(ask(&w, stopped_by) == SIGTTIN, "the job is not stopped by SIGTTIN");
	type(&p, "hello\n");
	CHECK(ask(&w, back_to_front) == 0, "it does not go on");
	CHECK(ask(&w, back_answer) == 0, "it has read something else");
}
static void pty_background_reader_spoil(void) { ask(&w, stopped_by); }
STATE(pty_background_reader)

static int write_bg(void) { return write(p.slave, "from behind\n", 12) == 12 ? 0 : 1; }
static int write_in_back(void) { order(&back, write_bg); return until_stopped(); }
static void pty_background_writer_setup(void)
{
	make_pty(&p);
	struct termios2 s = get(p.slave);
	s.c_lflag |= TOSTOP;
	set(p.slave, s);
	hire(&w, lead_jobs);
	back_pid = ask(&w, make_back);
	ask(&w, write_in_back);
	CHECK(ask(&w, stopped_by) == SIGTTOU, "the job is not stopped by SIGTTOU");
}
static void pty_background_writer_check(void)
{
	CHECK(ask(&w, stopped_by) == 0, "the stop is told again");
	expect_nothing(p.master);
	CHECK(ask(&w, back_to_front) == 0, "it does not go on");
	CHECK(ask(&w, back_answer) == 0, "it could not write");
	expect_text(p.master, "from behind\r\n");
}
static void pty_background_writer_spoil(void) { ask(&w, back_to_front); ask(&w, back_answer); }
STATE(pty_background_writer)

static int signals;
static void count(int signal) { (void)signal; signals++; }
static int catch_winch(void) { signal(SIGWINCH, count); return 0; }
static int winches(void) { usleep(20000); return signals; }
static void pty_resized_later_setup(void) { make_pty(&p); MUST(ioctl(p.master, TIOCSWINSZ, &(struct winsize){.ws_row = 5, .ws_col = 6})); hire(&w, lead); ask(&w, catch_winch); }
static void pty_resized_later_check(void)
{
	CHECK(ask(&w, winches) == 0, "it was told of a size");
	MUST(ioctl(p.master, TIOCSWINSZ, &(struct winsize){.ws_row = 7, .ws_col = 6}));
	CHECK(ask(&w, winches) == 1, "it is not told of a size");
}
static void pty_resized_later_spoil(void) { MUST(ioctl(p.master, TIOCSWINSZ, &(struct winsize){.ws_row = 7, .ws_col = 6})); }
STATE(pty_resized_later)

/* --- programs --- */

static pid_t program(char *const *argv)
{
	pid_t child = MUST(fork());
	if (child == 0) {
		lead();
		for (int fd = 0; fd < 3; fd++)
			dup2(p.slave, fd);
		close(p.slave);
		close(p.master);
		execv(argv[0], argv);
		_exit(127);
	}
	return child;
}

static pid_t shell;

/* Waits until the output has `text`. */
static void until_text(const char *text)
{
	char all[65536];
	size_t got = 0;
	while (got < sizeof all - 1) {
		struct pollfd poller = {.fd = p.master, .events = POLLIN};
		all[got] = 0;
		if (strstr(all, text))
			return;
		CHECK(MUST(poll(&poller, 1, 3000)) == 1, "no %s in: %s", text, all);
		ssize_t count = read(p.master, all + got, sizeof all - 1 - got);
		CHECK(count > 0, "the program has ended, and said: %s", all);
		got += (size_t)count;
	}
	fail("too much output");
}

static void pty_cat_setup(void) { make_pty(&p); shell = program((char *[]){"/bin/cat", NULL}); close(p.slave); type(&p, "one\ntw"); until_text("one\r\ntwone\r\n"); }
static void pty_cat_check(void)
{
	type(&p, "o\n\x04");
	until_text("o\r\ntwo\r\n");
	expect_exit(shell, 0);
}
static void pty_cat_spoil(void) { type(&p, "\x15"); }
STATE(pty_cat)

static void pty_shell_setup(void)
{
	make_pty(&p);
	shell = program((char *[]){"/bin/sh", "-i", NULL});
	close(p.slave);
	type(&p, "PS1='[p''rompt]'; x=41\n");
	until_text("[prompt]");
	type(&p, "sleep 1000 & echo started\n");
	until_text("\nstarted");
	type(&p, "cat\n");
	until_text("cat\r\n");
	type(&p, "up\n");
	until_text("up\r\n");
	usleep(100000);
	type(&p, "\x1a");
	until_text("Stopped");
	type(&p, "echo half-typ");
	until_text("half-typ");
	usleep(20000);
}
static void pty_shell_check(void)
{
	type(&p, "ed $((x+1))\n");
	until_text("half-typed 42");
	type(&p, "jobs\n");
	until_text("Running");
	type(&p, "fg %2\n");
	until_text("cat\r\n");
	usleep(100000);
	type(&p, "via cat\n");
	until_text("via cat\r\nvia cat\r\n");
	type(&p, "\x04");
	until_text("[prompt]");
	type(&p, "kill %1; exit 7\n");
	expect_exit(shell, 7);
}
static void pty_shell_spoil(void) { type(&p, "\x15x=1; kill %2; echo "); }
STATE(pty_shell)

/* --- who has which side --- */

static int close_slave(void) { return close(p.slave); }
static int opens_by_name(void) { int fd = open("/dev/tty", O_RDWR); int written = (int)write(fd, "unopened", 8); close(fd); return written == 8 ? 0 : 1; }
static void pty_controls_unopened_setup(void) { make_pty(&p); hire(&w, lead); CHECK(ask(&w, close_slave) == 0, "close"); close(p.slave); }
static void pty_controls_unopened_check(void)
{
	CHECK(polled(p.master, POLLIN) & POLLHUP, "the master is not hung up");
	CHECK(ask(&w, opens_by_name) == 0, "/dev/tty is none");
	expect_text(p.master, "unopened");
}
static int take_none(void) { int fd = open("/dev/tty", O_RDWR); signal(SIGHUP, SIG_IGN); return ioctl(fd, TIOCNOTTY); }
static void pty_controls_unopened_spoil(void) { ask(&w, take_none); }
STATE(pty_controls_unopened)

static int keep_master(void) { return close(p.slave); }
static int read_master(void) { expect_text(p.master, "from the parent"); return write(p.master, "from the child\n", 15) == 15 ? 0 : 1; }
static void pty_master_in_child_setup(void) { make_pty(&p); make_raw(p.slave); hire(&w, NULL); CHECK(ask(&w, keep_master) == 0, "close"); close(p.master); }
static void pty_master_in_child_check(void)
{
	MUST(write(p.slave, "from the parent", 15));
	CHECK(ask(&w, read_master) == 0, "the child could not write");
	expect_text(p.slave, "from the child\n");
	kill(w.pid, SIGKILL);
	waitpid(w.pid, NULL, 0);
	CHECK(polled(p.slave, POLLIN) & POLLHUP, "it is not hung up without the child");
}
static void pty_master_in_child_spoil(void) { kill(w.pid, SIGKILL); }
STATE(pty_master_in_child)

static int set_nonblocking(void) { return fcntl(p.slave, F_SETFL, O_RDWR | O_NONBLOCK); }
static void pty_shared_by_fork_setup(void) { make_pty(&p); hire(&w, NULL); }
static void pty_shared_by_fork_check(void)
{
	CHECK(!(MUST(fcntl(p.slave, F_GETFL)) & O_NONBLOCK), "it does not block");
	CHECK(ask(&w, set_nonblocking) == 0, "the child can't set it");
	CHECK(MUST(fcntl(p.slave, F_GETFL)) & O_NONBLOCK, "it is not shared");
}
static void pty_shared_by_fork_spoil(void) { int fd = MUST(open(p.path, O_RDWR | O_NOCTTY)); MUST(dup2(fd, p.slave)); }
STATE(pty_shared_by_fork)

/* A session whose leader has ended: its members have no terminal, and the terminal no session. */
static int told_member[2];
static int member_body(void)
{
	char byte;
	if (read(told_member[0], &byte, 1) != 1)
		return 9;
	int fd = open("/dev/tty", O_RDWR);
	const char *said = fd == -1 && errno == ENXIO ? "member" : "has it";
	return write(p.slave, said, 6) == 6 ? 0 : 1;
}
static void leader_ends(void)
{
	lead();
	signal(SIGHUP, SIG_IGN);
	early = in_child(member_body);
	_exit(0);
}
static void pty_leader_ended_setup(void)
{
	make_pty(&p);
	make_raw(p.slave);
	MUST(pipe(told_member));
	signal(SIGHUP, SIG_IGN);
	hire(&w, leader_ends);
	int status;
	MUST(waitpid(w.pid, &status, 0));
}
static void pty_leader_ended_check(void)
{
	int session;
	CHECK(ioctl(p.master, TIOCGSID, &session) == -1 && errno == ENOTTY, "it has the session %d", session);
	MUST(write(told_member[1], "x", 1));
	expect_text(p.master, "member");
}
static void pty_leader_ended_spoil(void) { hire(&v, lead); ask(&v, is_controlled); }
STATE(pty_leader_ended)

/* A relay as script(1) and terminal multiplexers are. */
static struct pty outer;
static void relay_loop(void)
{
	struct pollfd polls[2] = {{.fd = outer.slave, .events = POLLIN}, {.fd = p.master, .events = POLLIN}};
	char buffer[256];
	while (poll(polls, 2, -1) >= 0 || errno == EINTR)
		for (int i = 0; i < 2; i++)
			if (polls[i].revents & POLLIN) {
				ssize_t count = read(polls[i].fd, buffer, sizeof buffer);
				if (count <= 0 || write(polls[1 - i].fd, buffer, (size_t)count) != count)
					_exit(3);
			}
	_exit(2);
}
static void pty_relay_setup(void)
{
	make_pty(&outer);
	make_raw(outer.slave);
	make_pty(&p);
	shell = program((char *[]){"/bin/sh", "-i", NULL});
	close(p.slave);
	hire(&w, relay_loop);
	close(p.master);
	p.master = outer.master;
	type(&p, "PS1='[p''rompt]'; y=4\n");
	until_text("[prompt]");
}
static void pty_relay_check(void) { type(&p, "echo relayed $((y*2))\n"); until_text("relayed 8"); kill(w.pid, SIGKILL); waitpid(w.pid, NULL, 0); }
static void pty_relay_spoil(void) { type(&p, "y=1\n"); until_text("[prompt]"); }
STATE(pty_relay)
