import java.io.FileInputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.atomic.AtomicLong;

/** A JVM with 20 threads that meet after each step, and make enough garbage to keep a concurrent collector busy. */
public final class Collected {
    private static final int THREADS = 20;
    private static final AtomicLong met = new AtomicLong();

    private static long turn(Map<Integer, List<String>> kept, int number, int step) {
        long sum = 0;
        for (int at = 0; at < 6000; at++) {
            int key = (at * 31 + step * 17 + number) % 1500;
            List<String> list = kept.computeIfAbsent(key, any -> new ArrayList<>());
            list.add("thread " + number + " step " + step + " at " + at);
            if (list.size() > 6) {
                sum = sum * 31 + list.remove(0).hashCode();
            }
        }
        return sum;
    }

    public static void main(String[] arguments) throws Exception {
        byte[] bytes = new byte[8];
        try (FileInputStream random = new FileInputStream("/dev/urandom")) {
            random.read(bytes);
        }
        StringBuilder made = new StringBuilder();
        for (byte one : bytes) {
            made.append(String.format("%02x", one));
        }
        String nonce = made.toString();
        System.out.println("nonce " + nonce);
        Files.writeString(Path.of("/var/tmp/nonce"), nonce);
        String work = System.getenv("WORK");
        int steps = Math.max(1, 900 * (work == null ? 100 : Integer.parseInt(work)) / 100);
        int[] step = {0};
        CyclicBarrier barrier = new CyclicBarrier(THREADS, () -> {
            step[0]++;
            met.addAndGet(THREADS);
            if (step[0] == 1) {
                System.out.println("ready");
            }
            System.out.println("step " + step[0]);
            System.out.flush();
        });
        long[] sums = new long[THREADS];
        Throwable[] failed = new Throwable[1];
        List<Thread> threads = new ArrayList<>();
        for (int number = 0; number < THREADS; number++) {
            int mine = number;
            Thread thread = new Thread(() -> {
                Map<Integer, List<String>> kept = new HashMap<>();
                try {
                    for (int at = 1; at <= steps; at++) {
                        sums[mine] = sums[mine] * 1000003 + turn(kept, mine, at);
                        // A null that is followed: the JVM makes an exception of a signal.
                        try {
                            Object nothing = at < 0 ? "never" : null;
                            sums[mine] += nothing.hashCode();
                        } catch (NullPointerException expected) {
                            sums[mine]++;
                        }
                        barrier.await();
                    }
                } catch (Throwable error) {
                    failed[0] = error;
                }
            });
            threads.add(thread);
            thread.start();
        }
        for (Thread thread : threads) {
            thread.join();
        }
        if (failed[0] != null || met.get() != (long) THREADS * steps) {
            System.out.println("differs: " + failed[0] + ", " + met.get() + " met");
            System.exit(1);
        }
        if (!Files.readString(Path.of("/var/tmp/nonce")).equals(nonce)) {
            System.out.println("differs: another nonce");
            System.exit(1);
        }
        MessageDigest digest = MessageDigest.getInstance("SHA-256");
        for (long sum : sums) {
            digest.update(Long.toString(sum).getBytes());
        }
        StringBuilder result = new StringBuilder();
        for (byte one : digest.digest()) {
            result.append(String.format("%02x", one));
        }
        System.out.println("OK " + nonce + " " + result);
    }
}
