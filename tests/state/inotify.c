/* Notices of changes: inotify. */
#include "state.h"

#include <sys/inotify.h>
#include <sys/ioctl.h>

static int in, wd[8];

static void touch(const char *path) { close(MUST(open(path, O_WRONLY | O_CREAT, 0600))); }

static int queued(void)
{
	int bytes;
	MUST(ioctl(in, FIONREAD, &bytes));
	return bytes;
}

/* The next event is this one; NULL: without a name. */
static void expect(int watch, uint32_t mask, const char *name)
{
	static char buffer[8192];
	static size_t filled, used;
	if (used == filled) {
		filled = (size_t)MUST(read(in, buffer, sizeof buffer));
		used = 0;
	}
	const struct inotify_event *event = (const void *)(buffer + used);
	used += sizeof *event + event->len;
	CHECK(event->wd == watch && event->mask == mask, "event %#x of watch %d, not %#x of %d", event->mask, event->wd, mask, watch);
	CHECK(name ? event->len && !strcmp(event->name, name) : !event->len, "the event names %s", event->len ? event->name : "nothing");
}

static void new_instance(void) { in = MUST(inotify_init1(IN_NONBLOCK | IN_CLOEXEC)); }

static void inotify_watches_setup(void)
{
	new_instance();
	MUST(mkdir("/tmp/watched", 0700));
	touch("/tmp/watched/file");
	MUST(mkdir("/dev/shm/watched", 0700));
	wd[0] = MUST(inotify_add_watch(in, "/tmp/watched", IN_CREATE | IN_DELETE | IN_ONLYDIR));
	wd[1] = MUST(inotify_add_watch(in, "/tmp/watched/file", IN_MODIFY | IN_ATTRIB));
	wd[2] = MUST(inotify_add_watch(in, "/dev/shm/watched", IN_MOVE | IN_EXCL_UNLINK));
	wd[3] = MUST(inotify_add_watch(in, "/etc/passwd", IN_ALL_EVENTS));
}
static void inotify_watches_check(void)
{
	CHECK(queued() == 0, "there are %d bytes of events that nobody caused", queued());
	CHECK(MUST(fcntl(in, F_GETFL)) & O_NONBLOCK, "the instance blocks");
	touch("/tmp/watched/new");
	expect(wd[0], IN_CREATE, "new");
	int file = MUST(open("/tmp/watched/file", O_WRONLY));
	MUST(write(file, "x", 1));
	expect(wd[1], IN_MODIFY, NULL);
	touch("/dev/shm/watched/a");
	MUST(rename("/dev/shm/watched/a", "/dev/shm/watched/b"));
	expect(wd[2], IN_MOVED_FROM, "a");
	expect(wd[2], IN_MOVED_TO, "b");
	close(MUST(open("/etc/passwd", O_RDONLY)));
	expect(wd[3], IN_OPEN, NULL);
	expect(wd[3], IN_CLOSE_NOWRITE, NULL);
	MUST(unlink("/tmp/watched/new"));
	expect(wd[0], IN_DELETE, "new");
	CHECK(queued() == 0, "too many events");
}
static void inotify_watches_spoil(void) { MUST(inotify_rm_watch(in, wd[1])); }
STATE(inotify_watches)

static void inotify_numbers_setup(void)
{
	new_instance();
	char name[64];
	for (int i = 0; i < 8; i++) {
		snprintf(name, sizeof name, "/tmp/number-%d", i);
		touch(name);
		wd[i] = MUST(inotify_add_watch(in, name, IN_OPEN));
	}
	MUST(inotify_rm_watch(in, wd[0]));
	MUST(inotify_rm_watch(in, wd[3]));
	MUST(inotify_rm_watch(in, wd[4]));
	char events[512];
	MUST(read(in, events, sizeof events));
}
static void inotify_numbers_check(void)
{
	static const int kept[] = {1, 2, 5, 6, 7};
	char name[64];
	for (int i = 0; i < 5; i++) {
		snprintf(name, sizeof name, "/tmp/number-%d", kept[i]);
		close(MUST(open(name, O_RDONLY)));
		expect(kept[i] + 1, IN_OPEN, NULL);
	}
	int next = MUST(inotify_add_watch(in, "/tmp", IN_DELETE));
	CHECK(next == 9, "the next watch is %d", next);
	CHECK(inotify_rm_watch(in, 1) == -1 && errno == EINVAL, "watch 1 is there");
	CHECK(inotify_add_watch(in, "/tmp/number-6", IN_OPEN) == 7, "the file is watched twice");
}
static void inotify_numbers_spoil(void) { MUST(inotify_rm_watch(in, 7)); }
STATE(inotify_numbers)

static void inotify_oneshot_setup(void)
{
	new_instance();
	touch("/tmp/once");
	wd[0] = MUST(inotify_add_watch(in, "/tmp/once", IN_OPEN | IN_ONESHOT));
}
static void inotify_oneshot_check(void)
{
	CHECK(queued() == 0, "the watch is used up");
	close(MUST(open("/tmp/once", O_RDONLY)));
	expect(wd[0], IN_OPEN, NULL);
	expect(wd[0], IN_IGNORED, NULL);
	close(MUST(open("/tmp/once", O_RDONLY)));
	CHECK(queued() == 0, "the watch is still there");
}
static void inotify_oneshot_spoil(void) { MUST(inotify_add_watch(in, "/tmp/once", IN_OPEN)); }
STATE(inotify_oneshot)

static int open_file, directory;
static void inotify_held_files_setup(void)
{
	new_instance();
	MUST(mkdir("/tmp/held", 0700));
	touch("/tmp/held/file");
	MUST(chdir("/tmp/held"));
	open_file = MUST(open("/tmp/held/file", O_RDWR));
	directory = MUST(open("/tmp/held", O_RDONLY | O_DIRECTORY));
	wd[0] = MUST(inotify_add_watch(in, "/tmp/held", IN_ALL_EVENTS));
	wd[1] = MUST(inotify_add_watch(in, "/tmp/held/file", IN_ALL_EVENTS));
}
static void inotify_held_files_check(void)
{
	CHECK(queued() == 0, "there are %d bytes of events that nobody caused", queued());
	MUST(write(open_file, "x", 1));
	expect(wd[0], IN_MODIFY, "file");
	expect(wd[1], IN_MODIFY, NULL);
	close(open_file);
	expect(wd[0], IN_CLOSE_WRITE, "file");
	expect(wd[1], IN_CLOSE_WRITE, NULL);
}
static void inotify_held_files_spoil(void) { close(MUST(open("/tmp/held/file", O_RDONLY))); }
STATE(inotify_held_files)

static void inotify_renamed_setup(void)
{
	new_instance();
	touch("/tmp/before-rename");
	MUST(mkdir("/var/tmp/dir-before", 0700));
	wd[0] = MUST(inotify_add_watch(in, "/tmp/before-rename", IN_ATTRIB | IN_DELETE_SELF));
	wd[1] = MUST(inotify_add_watch(in, "/var/tmp/dir-before", IN_CREATE));
	MUST(rename("/tmp/before-rename", "/tmp/after-rename"));
	touch("/tmp/before-rename");
	MUST(rename("/var/tmp/dir-before", "/root/dir-after"));
}
static void inotify_renamed_check(void)
{
	CHECK(queued() == 0, "events that nobody caused");
	MUST(chmod("/tmp/before-rename", 0644));
	CHECK(queued() == 0, "another file is watched");
	MUST(chmod("/tmp/after-rename", 0644));
	expect(wd[0], IN_ATTRIB, NULL);
	touch("/root/dir-after/x");
	expect(wd[1], IN_CREATE, "x");
}
static void inotify_renamed_spoil(void) { MUST(unlink("/tmp/after-rename")); }
STATE(inotify_renamed)

static void inotify_unlinked_setup(void)
{
	new_instance();
	touch("/tmp/unlinked-watched");
	open_file = MUST(open("/tmp/unlinked-watched", O_RDWR));
	wd[0] = MUST(inotify_add_watch(in, "/tmp/unlinked-watched", IN_MODIFY | IN_DELETE_SELF));
	MUST(unlink("/tmp/unlinked-watched"));
}
static void inotify_unlinked_check(void)
{
	CHECK(queued() == 0, "events that nobody caused");
	MUST(write(open_file, "x", 1));
	expect(wd[0], IN_MODIFY, NULL);
	close(open_file);
	expect(wd[0], IN_DELETE_SELF, NULL);
	expect(wd[0], IN_IGNORED, NULL);
}
static void inotify_unlinked_spoil(void) { MUST(inotify_rm_watch(in, wd[0])); }
STATE(inotify_unlinked)

static void inotify_symlink_setup(void)
{
	new_instance();
	MUST(symlink("/etc/passwd", "/tmp/watched-link"));
	wd[0] = MUST(inotify_add_watch(in, "/tmp/watched-link", IN_ATTRIB | IN_DELETE_SELF | IN_DONT_FOLLOW));
	wd[1] = MUST(inotify_add_watch(in, "/tmp/watched-link", IN_OPEN));
}
static void inotify_symlink_check(void)
{
	close(MUST(open("/etc/passwd", O_RDONLY)));
	expect(wd[1], IN_OPEN, NULL);
	MUST(unlink("/tmp/watched-link"));
	expect(wd[0], IN_ATTRIB, NULL);
	expect(wd[0], IN_DELETE_SELF, NULL);
}
static void inotify_symlink_spoil(void) { MUST(inotify_rm_watch(in, wd[1])); }
STATE(inotify_symlink)

static void inotify_unread_setup(void)
{
	new_instance();
	MUST(mkdir("/tmp/unread", 0700));
	wd[0] = MUST(inotify_add_watch(in, "/tmp/unread", IN_CREATE));
	touch("/tmp/unread/one");
}
static void inotify_unread_check(void) { expect(wd[0], IN_CREATE, "one"); }
static void inotify_unread_spoil(void) { char events[64]; MUST(read(in, events, sizeof events)); }
STATE(inotify_unread, .refused = "events that nobody has read")
