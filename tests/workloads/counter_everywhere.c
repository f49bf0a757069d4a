/*
 * One counter, kept in memory, in an append-only log, in a file written in place, in a shared writable mapping, in SQLite,
 * and in a file replaced by rename. Before and after each step all six must say the same: a capsule whose files are of
 * another instant than its memory shows at the next step.
 */
#include "workload.h"
#include <sqlite3.h>
#include <sys/mman.h>

static volatile uint64_t memory;
static int log_fd, place_fd;
static volatile uint64_t *mapping;
static sqlite3 *database;

/* The database's device and inode, as SQLite keeps them, and the same in disguise: whoever gives SQLite the numbers of a
 * moved file must leave these alone. */
static volatile uint64_t numbers[2], disguised[2];

static void sql(const char *text)
{
	char *message = NULL;
	int code = sqlite3_exec(database, text, NULL, NULL, &message);
	CHECK(code == SQLITE_OK, "SQLite: %s: %s", text, message ? message : sqlite3_errstr(code));
}

static uint64_t sqlite_value(void)
{
	sqlite3_stmt *statement;
	CHECK(sqlite3_prepare_v2(database, "SELECT n FROM counter", -1, &statement, NULL) == SQLITE_OK, "SQLite: prepare: %s", sqlite3_errmsg(database));
	CHECK(sqlite3_step(statement) == SQLITE_ROW, "SQLite: no row: %s", sqlite3_errmsg(database));
	uint64_t value = (uint64_t)sqlite3_column_int64(statement, 0);
	sqlite3_finalize(statement);
	return value;
}

static uint64_t file_value(const char *path, off_t from_end)
{
	/* Opened anew each time: what counts is what the file system holds under the name. */
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0, "%s cannot be opened", path);
	uint64_t value = 0;
	if (from_end) {
		struct stat status;
		CHECK(fstat(fd, &status) == 0, "%s: fstat", path);
		CHECK(status.st_size % 8 == 0, "%s ends within a record: %lld bytes", path, (long long)status.st_size);
		if (status.st_size)
			CHECK(pread(fd, &value, 8, status.st_size - 8) == 8, "%s: short read", path);
		CHECK((uint64_t)status.st_size / 8 == value, "%s holds %lld records, the last says %llu", path,
		      (long long)status.st_size / 8, (unsigned long long)value);
	} else {
		CHECK(pread(fd, &value, 8, 0) == 8, "%s: short read", path);
	}
	close(fd);
	return value;
}

static void put_by_rename(uint64_t n)
{
	int fd = open("renamed.new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	CHECK(fd >= 0 && write(fd, &n, 8) == 8, "renamed.new: write");
	close(fd);
	CHECK(rename("renamed.new", "renamed") == 0, "rename");
}

static void all_say(uint64_t n)
{
	struct { const char *where; uint64_t value; } seen[] = {
		{"memory", memory}, {"log", file_value("log", 1)}, {"place", file_value("place", 0)},
		{"mapping", *mapping}, {"mapped file", file_value("mapped", 0)}, {"SQLite", sqlite_value()}, {"renamed", file_value("renamed", 0)},
	};
	for (size_t i = 0; i < sizeof seen / sizeof *seen; i++)
		CHECK(seen[i].value == n, "%s says %llu where %llu was counted", seen[i].where,
		      (unsigned long long)seen[i].value, (unsigned long long)n);
	CHECK(numbers[0] == ~disguised[0] && numbers[1] == ~disguised[1], "two numbers in memory that equal a file's were changed");
	CHECK(access("renamed.new", F_OK) != 0, "the file that was renamed away is still there");
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	const char *folder = getenv("COUNTER_DIR");
	folder = folder ? folder : "/var/counter";
	if (mkdir(folder, 0700) < 0 && errno != EEXIST)
		fail("set-up failed: %s", folder);
	MUST(chdir(folder));
	uint64_t zero = 0;
	log_fd = MUST(open("log", O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600));
	place_fd = MUST(open("place", O_RDWR | O_CREAT | O_TRUNC, 0600));
	MUST(pwrite(place_fd, &zero, 8, 0));
	int mapped = MUST(open("mapped", O_RDWR | O_CREAT | O_TRUNC, 0600));
	MUST(ftruncate(mapped, 4096));
	mapping = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, mapped, 0);
	CHECK(mapping != MAP_FAILED, "set-up failed: mmap");
	put_by_rename(0);
	unlink("sqlite.db");
	CHECK(sqlite3_open("sqlite.db", &database) == SQLITE_OK, "set-up failed: sqlite3_open");
	/* Durability is not what is tested, and fsync would leave few instants between two steps. */
	sql("PRAGMA synchronous = OFF");
	sql("CREATE TABLE counter (n INTEGER NOT NULL)");
	sql("INSERT INTO counter VALUES (0)");
	struct stat status;
	CHECK(stat("sqlite.db", &status) == 0, "set-up failed: stat");
	numbers[0] = status.st_dev;
	numbers[1] = status.st_ino;
	disguised[0] = ~numbers[0];
	disguised[1] = ~numbers[1];
	ready();

	uint64_t n = 0;
	while (goes_on()) {
		all_say(n);
		n++;
		memory = n;
		CHECK(write(log_fd, &n, 8) == 8, "log: write");
		CHECK(pwrite(place_fd, &n, 8, 0) == 8, "place: write");
		*mapping = n;
		char update[64];
		snprintf(update, sizeof update, "UPDATE counter SET n = %llu", (unsigned long long)n);
		sql(update);
		put_by_rename(n);
		if (n == 50) {
			uint64_t wrong = 7;
			if (breaking("memory")) memory = wrong;
			if (breaking("log")) MUST(ftruncate(log_fd, 8 * 49));
			if (breaking("place")) MUST(pwrite(place_fd, &wrong, 8, 0));
			if (breaking("mapping")) *mapping = wrong;
			if (breaking("sqlite")) sql("UPDATE counter SET n = 7");
			if (breaking("rename")) put_by_rename(wrong);
		}
		all_say(n);
	}
	CHECK(n > 0, "not one step was made");
	return finished("counted=%llu", (unsigned long long)n);
}
