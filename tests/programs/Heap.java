import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;

/**
 * java Heap RECORDS FILE: a heap of a JVM: a map of records with strings, numbers, lists and small maps, as heap.py has them, and
 * with the same report in FILE. It knows the check alone.
 */
public final class Heap {
    private static final int READINGS = 1, REQUEST = 2, CHECK = 1, DONE = 2, DIFFERS = 3;
    private static final String[] FIRST = "Ada Ben Cleo Dora Emil Fritz Gina Hugo Ines Jan Kira Lars".split(" ");
    private static final String[] LAST = "Arndt Bauer Conrad Dietz Ernst Fuchs Graf Haas Jung Kraus".split(" ");
    private static final String[] PLACES = "Aachen Berlin Chemnitz Dresden Erfurt Fulda Gera Halle Jena".split(" ");

    private record Address(String place, int street, String code) {}

    private record Entry(int id, String name, String mail, double score, List<Integer> visits, Address address, boolean active,
            String token, List<Double> series) {}

    private static String one(Random chance, String[] of) {
        return of[chance.nextInt(of.length)];
    }

    private static Entry entry(Random chance, int number) {
        List<Integer> visits = new ArrayList<>();
        String name = one(chance, FIRST) + " " + one(chance, LAST);
        String mail = "user" + number + "@" + one(chance, PLACES).toLowerCase() + ".example";
        double score = chance.nextDouble() * 100;
        for (int i = 0; i < 6; i++) {
            visits.add(chance.nextInt(10000));
        }
        Address address = new Address(one(chance, PLACES), chance.nextInt(300), String.format("%05d", chance.nextInt(100000)));
        boolean active = chance.nextDouble() < 0.7;
        StringBuilder token = new StringBuilder();
        List<Double> series = new ArrayList<>();
        for (int i = 0; i < 4; i++) {
            token.append(String.format("%016x", chance.nextLong()));
            series.add(chance.nextDouble());
        }
        return new Entry(number, name, mail, score, visits, address, active, token.toString(), series);
    }

    private static Map<String, Entry> filled(int count) {
        Random chance = new Random(7);
        Map<String, Entry> records = new HashMap<>();
        for (int number = 0; number < count; number++) {
            records.put("record-" + number, entry(chance, number));
        }
        return records;
    }

    /** Record by record: a second heap of the same size would not fit. */
    private static boolean isRight(Map<String, Entry> records, int count) {
        Random chance = new Random(7);
        boolean right = records.size() == count;
        for (int number = 0; number < count; number++) {
            right &= entry(chance, number).equals(records.get("record-" + number));
        }
        return right;
    }

    private static long word(RandomAccessFile report, int index) throws IOException {
        report.seek(index * 8L);
        return Long.reverseBytes(report.readLong());
    }

    private static void setWord(RandomAccessFile report, int index, long value) throws IOException {
        report.seek(index * 8L);
        report.writeLong(Long.reverseBytes(value));
    }

    public static void main(String[] arguments) throws Exception {
        int count = Integer.parseInt(arguments[0]);
        Map<String, Entry> records = filled(count);
        Path made = Path.of(arguments[1] + ".new");
        RandomAccessFile report = new RandomAccessFile(made.toFile(), "rw");
        report.setLength(4096);
        Files.move(made, Path.of(arguments[1]));
        for (long readings = 1;; readings++) {
            setWord(report, READINGS, readings);
            if (word(report, REQUEST) == CHECK) {
                setWord(report, REQUEST, isRight(records, count) ? DONE : DIFFERS);
            }
            Thread.sleep(5);
        }
    }
}
