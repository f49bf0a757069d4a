#!/bin/bash
# Open MPI: a launcher, its daemon's sockets and shared memory, and four processes that wait by turning.
exec mpirun -np 4 --allow-run-as-root --oversubscribe --mca btl self,vader ring
