#!/bin/bash
# STAR: an index of a simulated genome, then reads of single cells, aligned and counted by two threads.
set -euo pipefail
nonce=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')
echo "nonce $nonce"
mkdir /work
cd /work
cells.py .
echo ready
echo "step 1"
STAR --runMode genomeGenerate --runThreadN 2 --genomeDir index --genomeFastaFiles genome.fa --sjdbGTFfile genes.gtf \
  --genomeSAindexNbases 8 --sjdbOverhang 89 >index.log
echo "step 2"
STAR --runThreadN 2 --genomeDir index --readFilesIn 2.fq 1.fq --soloType CB_UMI_Simple --soloCBwhitelist cells \
  --soloUMIlen 12 --soloFeatures Gene --outSAMtype BAM SortedByCoordinate --outSAMattrRGline "ID:$nonce" \
  --limitBAMsortRAM 1000000000 --outFileNamePrefix out. >align.log
echo "step 3"
# The alignments say which start wrote them; the counts are those of every start.
grep -q "ID:$nonce" out.Log.out || { echo "differs: the log has no $nonce"; exit 1; }
echo "OK $nonce $(cat out.Solo.out/Gene/raw/*.mtx out.Solo.out/Gene/raw/*.tsv | sha256sum | cut -c1-64)"
