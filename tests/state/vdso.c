/*
 * The vdso and its data, moved, unmapped, protected: in a child that makes no call through it any more.
 */
#include "state.h"

#include <sys/auxv.h>
#include <sys/mman.h>

struct part {
	unsigned long start, end;
	char protection[5];
	char name[24];
};

/* The parts that a process has; what they were is kept in static memory, which a restore brings back. */
static struct part parts[8];

static int list_parts(struct part *list)
{
	FILE *file = fopen("/proc/self/maps", "r");
	CHECK(file, "no maps");
	char line[512];
	int count = 0;
	memset(list, 0, sizeof parts);
	while (fgets(line, sizeof line, file) && count < 8) {
		struct part *part = &list[count];
		if (sscanf(line, "%lx-%lx %4s %*s %*s %*s %23s", &part->start, &part->end, part->protection, part->name) == 4 &&
			(!strcmp(part->name, "[vdso]") || !strncmp(part->name, "[vvar", 5)))
			count++;
		else
			memset(part, 0, sizeof *part);
	}
	fclose(file);
	return count;
}

static struct part *part_named(const char *name)
{
	for (struct part *part = parts; part < parts + 8; part++)
		if (!strcmp(part->name, name))
			return part;
	fail("no part %s", name);
}

static void change_nothing(void)
{
	list_parts(parts);
}

/* Says whether the parts are as they were left. */
static int compare_when_finishing(void)
{
	struct part now[8];
	until_finishing();
	list_parts(now);
	return !!memcmp(now, parts, sizeof parts);
}

static pid_t child;

static void expect_same(void) { expect_exit(child, 0); }
/* It is gone when the check asks for its end. */
static void end_child(void) { MUST(waitpid(child, NULL, 0)); }

/* --- all of it unmapped --- */

static int without_vdso(void)
{
	int count = list_parts(parts);
	for (int i = 0; i < count; i++)
		MUST(munmap((void *)parts[i].start, parts[i].end - parts[i].start));
	change_nothing();
	return compare_when_finishing();
}
static void vdso_unmapped_setup(void) { child = in_child(without_vdso); usleep(50000); }
static void vdso_unmapped_check(void) { expect_same(); }
static void vdso_unmapped_spoil(void) { end_child(); }
STATE(vdso_unmapped)

/* --- only its data unmapped --- */

static int without_data(void)
{
	list_parts(parts);
	struct part *data = part_named("[vvar]");
	MUST(munmap((void *)data->start, data->end - data->start));
	change_nothing();
	return compare_when_finishing();
}
static void vdso_data_unmapped_setup(void) { child = in_child(without_data); usleep(50000); }
static void vdso_data_unmapped_check(void) { expect_same(); }
static void vdso_data_unmapped_spoil(void) { end_child(); }
STATE(vdso_data_unmapped)

/* --- moved, in another order --- */

static int moved_vdso(void)
{
	list_parts(parts);
	struct part *vdso = part_named("[vdso]"), *data = part_named("[vvar]");
	char *place = mmap(NULL, 64 << 12, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(munmap(place, 64 << 12));
	size_t bytes = vdso->end - vdso->start;
	CHECK(mremap((void *)vdso->start, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place, "it does not move");
	bytes = data->end - data->start;
	place += 32 << 12;
	CHECK(mremap((void *)data->start, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place, "its data do not move");
	change_nothing();
	return compare_when_finishing();
}
static void vdso_moved_setup(void) { child = in_child(moved_vdso); usleep(50000); }
static void vdso_moved_check(void) { expect_same(); }
static void vdso_moved_spoil(void) { end_child(); }
STATE(vdso_moved)

/* --- no longer to be run, and open to be written --- */

static int protect_vdso(int protection)
{
	list_parts(parts);
	struct part *vdso = part_named("[vdso]");
	MUST(mprotect((void *)vdso->start, vdso->end - vdso->start, protection));
	change_nothing();
	return compare_when_finishing();
}
static int forbidden_vdso(void) { return protect_vdso(PROT_READ); }
static int writable_vdso(void) { return protect_vdso(PROT_READ | PROT_WRITE | PROT_EXEC); }

static void vdso_forbidden_setup(void) { child = in_child(forbidden_vdso); usleep(50000); }
static void vdso_forbidden_check(void) { expect_same(); }
static void vdso_forbidden_spoil(void) { end_child(); }
STATE(vdso_forbidden)

static void vdso_writable_setup(void) { child = in_child(writable_vdso); usleep(50000); }
static void vdso_writable_check(void) { expect_same(); }
static void vdso_writable_spoil(void) { end_child(); }
STATE(vdso_writable)

/* --- written to --- */

static int rewritten_vdso(void)
{
	list_parts(parts);
	struct part *vdso = part_named("[vdso]");
	MUST(mprotect((void *)vdso->start, vdso->end - vdso->start, PROT_READ | PROT_WRITE | PROT_EXEC));
	((volatile char *)vdso->start)[8] = 'x';
	change_nothing();
	return compare_when_finishing() || ((volatile char *)vdso->start)[8] != 'x';
}
static void vdso_rewritten_setup(void) { child = in_child(rewritten_vdso); usleep(50000); }
static void vdso_rewritten_check(void) { expect_same(); }
static void vdso_rewritten_spoil(void) { end_child(); }
STATE(vdso_rewritten, .refused = "a vdso that the program has written to is not supported")
