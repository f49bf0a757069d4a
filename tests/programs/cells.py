#!/usr/bin/python3
"""cells.py FOLDER: simulates a genome with genes, and reads of single cells, the same each time."""

import random
import sys

from program import work

GENES, CELLS, READ = 200, 60, 90


def main():
    folder = sys.argv[1]
    draw = random.Random(11)
    bases = "ACGT"
    genome, genes = [], []
    for number in range(GENES):
        genome.append("".join(draw.choices(bases, k=500)))
        at = sum(map(len, genome))
        gene = "".join(draw.choices(bases, k=1500))
        genes.append(gene)
        genome.append(gene)
        with open(f"{folder}/genes.gtf", "a" if number else "w") as out:
            out.write(f'one\tsim\texon\t{at + 1}\t{at + 1500}\t.\t+\t.\tgene_id "g{number}"; transcript_id "t{number}";\n')
    with open(f"{folder}/genome.fa", "w") as out:
        out.write(">one\n" + "".join(genome) + "\n")
    cells = sorted({"".join(draw.choices(bases, k=16)) for _ in range(CELLS)})
    with open(f"{folder}/cells", "w") as out:
        out.write("\n".join(cells) + "\n")
    quality = "I" * READ
    with open(f"{folder}/1.fq", "w") as first, open(f"{folder}/2.fq", "w") as second:
        for number in range(work(900000)):
            gene = genes[min(draw.randrange(GENES), draw.randrange(GENES))]
            at = draw.randrange(len(gene) - READ)
            read = list(gene[at:at + READ])
            if draw.random() < 0.3:
                read[draw.randrange(READ)] = draw.choice(bases)
            code = draw.choice(cells) + "".join(draw.choices(bases, k=12))
            first.write(f"@{number}\n{code}\n+\n{'I' * 28}\n")
            second.write(f"@{number}\n{''.join(read)}\n+\n{quality}\n")


if __name__ == "__main__":
    main()
