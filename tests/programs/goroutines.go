// Goroutines that hash, pass on by channels, wait for timers, and are preempted by signals, with a collector beside them.
package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const lanes = 200

type item struct {
	lane  int
	state [32]byte
}

func differs(format string, values ...interface{}) {
	fmt.Printf("differs: "+format+"\n", values...)
	os.Exit(1)
}

// spin never calls anything: only a signal takes the processor from it.
func spin(from uint64) uint64 {
	for turn := 0; turn < 20000000; turn++ {
		from = from*6364136223846793005 + 1442695040888963407
	}
	return from
}

func main() {
	var bytes [8]byte
	if _, err := rand.Read(bytes[:]); err != nil {
		differs("%v", err)
	}
	nonce := hex.EncodeToString(bytes[:])
	fmt.Println("nonce", nonce)
	if err := os.WriteFile("/var/tmp/nonce", []byte(nonce), 0o600); err != nil {
		differs("%v", err)
	}
	percent := 100
	if text := os.Getenv("WORK"); text != "" {
		percent, _ = strconv.Atoi(text)
	}
	steps := 750 * percent / 100
	if steps < 1 {
		steps = 1
	}
	var ticks int64
	ticker := time.NewTicker(10 * time.Millisecond)
	go func() {
		for range ticker.C {
			atomic.AddInt64(&ticks, 1)
		}
	}()
	states := make([][32]byte, lanes)
	var spun uint64
	for step := 1; step <= steps; step++ {
		results := make(chan item)
		var group sync.WaitGroup
		for lane := 0; lane < lanes; lane++ {
			group.Add(1)
			go func(lane int, state [32]byte) {
				defer group.Done()
				kept := map[string][]byte{}
				for turn := 0; turn < 300; turn++ {
					state = sha256.Sum256(append(state[:], byte(step), byte(lane), byte(turn)))
					kept[hex.EncodeToString(state[:4])] = append([]byte(nil), state[:]...)
				}
				if lane%50 == 0 {
					time.Sleep(time.Millisecond)
				}
				results <- item{lane, state}
			}(lane, states[lane])
		}
		spinning := make(chan uint64)
		go func() { spinning <- spin(spun + uint64(step)) }()
		go func() {
			group.Wait()
			close(results)
		}()
		var seen []int
		for result := range results {
			states[result.lane] = result.state
			seen = append(seen, result.lane)
		}
		spun = <-spinning
		sort.Ints(seen)
		for lane, number := range seen {
			if lane != number {
				differs("lane %d came as %d in step %d", lane, number, step)
			}
		}
		if len(seen) != lanes {
			differs("%d lanes in step %d", len(seen), step)
		}
		if step == 1 {
			fmt.Println("ready")
		}
		fmt.Println("step", step)
	}
	if kept, err := os.ReadFile("/var/tmp/nonce"); err != nil || string(kept) != nonce {
		differs("the nonce was %s", kept)
	}
	if atomic.LoadInt64(&ticks) == 0 {
		differs("no tick")
	}
	digest := sha256.New()
	for _, state := range states {
		digest.Write(state[:])
	}
	fmt.Printf("OK %s %x-%x\n", nonce, digest.Sum(nil), spun)
}
