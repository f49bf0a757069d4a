/*
 * OpenMP over a heap of 1 GiB (--mebibytes N in $MEBIBYTES): every element goes through steps that can be taken back, forward
 * and back, so that after each pair of passes the whole heap must be what it was at first. Values have 16 bits in words of 64,
 * so that memory compresses about as a program's does.
 */
#include "workload.h"
#include <omp.h>

#define STEPS 4

static uint64_t first(uint64_t i) { return mix(i) & 0xffff; }

int main(int argc, char **argv)
{
	begin(argc, argv);
	const char *size = getenv("MEBIBYTES");
	uint64_t count = (size ? strtoull(size, NULL, 10) : 1024) << 17;
	uint64_t *heap = malloc(count * 8);
	CHECK(heap != NULL && count > 0, "set-up failed: no memory");
	omp_set_num_threads(4);
	#pragma omp parallel for
	for (uint64_t i = 0; i < count; i++)
		heap[i] = first(i);
	ready();
	uint64_t passes = 0;
	do {
		/* An odd factor has an inverse modulo 2^16: 0x6255 * 0x8afd = 1. */
		for (uint64_t step = 0; step < STEPS; step++) {
			#pragma omp parallel for schedule(dynamic, 65536)
			for (uint64_t i = 0; i < count; i++)
				heap[i] = (heap[i] * 0x6255 + i + step) & 0xffff;
		}
		if (breaking("heap") && passes == 0)
			heap[count / 3] ^= 1;
		for (uint64_t step = STEPS; step-- > 0;) {
			#pragma omp parallel for schedule(dynamic, 65536)
			for (uint64_t i = 0; i < count; i++)
				heap[i] = ((heap[i] - i - step) * 0x8afd) & 0xffff;
		}
		uint64_t wrong = 0, sum = 0;
		#pragma omp parallel for reduction(+ : wrong, sum)
		for (uint64_t i = 0; i < count; i++) {
			wrong += heap[i] != first(i);
			sum += heap[i] * (i | 1);
		}
		CHECK(wrong == 0, "%llu of %llu elements of the heap", (unsigned long long)wrong, (unsigned long long)count);
		CHECK(omp_get_max_threads() == 4, "%d threads", omp_get_max_threads());
		passes++;
		if (!goes_on())
			return finished("checksum=%016llx passes=%llu", (unsigned long long)sum, (unsigned long long)passes);
	} while (true);
}
