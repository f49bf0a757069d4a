#!/usr/bin/Rscript
# R: forked workers of the package `parallel`, with random numbers of streams that a seed determines.
library(parallel)
RNGkind("L'Ecuyer-CMRG")
set.seed(42)
random <- file("/dev/urandom", "rb", raw = TRUE)
nonce <- paste(format(readBin(random, "raw", 8)), collapse = "")
close(random)
say <- function(...) { cat(..., "\n", sep = ""); flush(stdout()) }
say("nonce ", nonce)
work <- as.numeric(Sys.getenv("WORK", "100"))
kept <- tempfile()
writeLines(nonce, kept)

simulate <- function(number) {
  x <- matrix(rnorm(120 * 120), 120)
  decomposed <- svd(x)
  sorted <- sort(rnorm(200000))
  c(sum(decomposed$d), sorted[c(1, 1000, 200000)], Sys.getpid() > 0)
}

results <- file(tempfile(), "w+")
steps <- max(1, round(200 * work / 100))
for (step in seq_len(steps)) {
  parts <- mclapply(1:6, simulate, mc.cores = 2)
  whole <- vapply(parts, function(part) is.numeric(part) && length(part) == 5, TRUE)
  if (!all(whole)) { say("differs: a worker gave ", format(parts[!whole])); quit(status = 1) }
  # Streams of the workers follow from the master's, which goes on by itself.
  runif(1)
  writeLines(sprintf("%.17g", unlist(parts)), results)
  if (step == 1) say("ready")
  say("step ", step)
}
lines <- readLines(results)
close(results)
out <- tempfile()
writeLines(lines, out)
if (readLines(kept) != nonce) { say("differs: the nonce was ", readLines(kept)); quit(status = 1) }
say("OK ", nonce, " ", unname(tools::md5sum(out)))
