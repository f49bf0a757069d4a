/*
 * lines make SEED MEBIBYTES: writes lines of pseudo-random words, and on standard error how many and the sum of their hashes.
 * lines check: reads lines that must be in order, and prints the same about them. Whatever sorts keeps count and sum.
 */
#include "workload.h"

static uint64_t hash(const char *text, size_t length)
{
	uint64_t value = 14695981039346656037u;
	for (size_t i = 0; i < length; i++)
		value = (value ^ (uint8_t)text[i]) * 1099511628211u;
	return mix(value);
}

int main(int argc, char **argv)
{
	uint64_t count = 0, sum = 0;
	if (argc == 4 && !strcmp(argv[1], "make")) {
		uint64_t seed = strtoull(argv[2], NULL, 10), left = strtoull(argv[3], NULL, 10) << 20;
		static char buffer[1 << 16];
		setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
		for (uint64_t i = 0; left > 0; i++) {
			char line[64];
			uint64_t value = mix(mix(seed) + i);
			int length = snprintf(line, sizeof line, "%016llx %08llu record-%llu", (unsigned long long)value,
					      (unsigned long long)(value % 99999989), (unsigned long long)i);
			sum += hash(line, (size_t)length);
			count++;
			line[length++] = '\n';
			CHECK(fwrite(line, 1, (size_t)length, stdout) == (size_t)length, "write");
			left -= (uint64_t)length < left ? (uint64_t)length : left;
		}
		CHECK(fflush(stdout) == 0, "write");
		fprintf(stderr, "lines=%llu sum=%016llx\n", (unsigned long long)count, (unsigned long long)sum);
		return 0;
	}
	CHECK(argc == 2 && !strcmp(argv[1], "check"), "usage: lines make SEED MEBIBYTES | lines check");
	static char one[2][1024];
	while (fgets(one[count & 1], sizeof one[0], stdin)) {
		size_t length = strcspn(one[count & 1], "\n");
		one[count & 1][length] = 0;
		CHECK(count == 0 || strcmp(one[(count & 1) ^ 1], one[count & 1]) <= 0, "line %llu is out of order", (unsigned long long)count + 1);
		sum += hash(one[count & 1], length);
		count++;
	}
	printf("lines=%llu sum=%016llx\n", (unsigned long long)count, (unsigned long long)sum);
	return 0;
}
