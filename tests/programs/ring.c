/* Four processes of MPI: numbers go round in a ring, sums over all, and much work between. */
#include <inttypes.h>
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NUMBERS = 20000 };

static uint64_t next(uint64_t state) {
  return state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
}

int main(int argc, char **argv) {
  int rank, size;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  uint64_t nonce = 0;
  if (rank == 0) {
    FILE *random = fopen("/dev/urandom", "r");
    if (!random || fread(&nonce, sizeof nonce, 1, random) != 1) MPI_Abort(MPI_COMM_WORLD, 2);
    fclose(random);
    printf("nonce %016" PRIx64 "\n", nonce);
    fflush(stdout);
  }
  MPI_Bcast(&nonce, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
  const char *work = getenv("WORK");
  int steps = 300 * (work ? atoi(work) : 100) / 100;
  if (steps < 1) steps = 1;
  uint64_t *mine = malloc(NUMBERS * sizeof *mine), *other = malloc(NUMBERS * sizeof *other);
  if (!mine || !other) MPI_Abort(MPI_COMM_WORLD, 2);
  for (int at = 0; at < NUMBERS; at++) mine[at] = (uint64_t)rank * NUMBERS + (uint64_t)at;
  uint64_t digest = 0;
  for (int step = 1; step <= steps; step++) {
    for (int turn = 0; turn < 1500; turn++)
      for (int at = 0; at < NUMBERS; at++) mine[at] = next(mine[at]);
    MPI_Sendrecv(mine, NUMBERS, MPI_UINT64_T, (rank + 1) % size, step, other, NUMBERS, MPI_UINT64_T,
                 (rank + size - 1) % size, step, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    memcpy(mine, other, NUMBERS * sizeof *mine);
    uint64_t sum = 0, all = 0;
    for (int at = 0; at < NUMBERS; at++) sum ^= mine[at];
    MPI_Allreduce(&sum, &all, 1, MPI_UINT64_T, MPI_BXOR, MPI_COMM_WORLD);
    digest = next(digest ^ all);
    if (rank == 0) {
      if (step == 1) puts("ready");
      printf("step %d\n", step);
      fflush(stdout);
    }
  }
  /* Everybody must still have the nonce of the same start. */
  uint64_t *nonces = malloc((size_t)size * sizeof *nonces);
  if (!nonces) MPI_Abort(MPI_COMM_WORLD, 2);
  MPI_Gather(&nonce, 1, MPI_UINT64_T, nonces, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
  int differs = 0;
  for (int at = 0; rank == 0 && at < size; at++) differs |= nonces[at] != nonce;
  if (rank == 0) {
    if (differs) puts("differs: another nonce");
    else printf("OK %016" PRIx64 " %016" PRIx64 "\n", nonce, digest);
    fflush(stdout);
  }
  MPI_Finalize();
  return differs;
}
