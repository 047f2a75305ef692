// The goroutines' side of examples/million.rs: so many are spawned, each parked with a few live locals, then all are
// woken once in random order and what they answer is checked. Prints the same figures, as one JSON object.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// memory is what the kernel says of this process, in bytes.
type memory struct{ resident, pageTables, mappings int }

func now() memory {
	status := read("/proc/self/status")
	kib := func(name string) int {
		for _, line := range strings.Split(status, "\n") {
			if strings.HasPrefix(line, name) {
				number, err := strconv.Atoi(strings.Fields(line)[1])
				check(err)
				return number << 10
			}
		}
		panic("no line " + name)
	}
	return memory{kib("VmRSS:"), kib("VmPTE:"), strings.Count(read("/proc/self/maps"), "\n")}
}

func read(path string) string {
	bytes, err := os.ReadFile(path)
	check(err)
	return string(bytes)
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Answers once, parks, and answers a second time with a sum over its locals.
//
//go:noinline
func parkedAt(wake <-chan uint64, answer chan<- uint64, depth int, seed uint64) uint64 {
	if depth > 0 {
		return parkedAt(wake, answer, depth-1, seed) + seed - seed
	}
	locals := [3]uint64{seed, seed ^ 1, seed ^ 2}
	answer <- seed + 1
	second := <-wake
	return second + locals[0] + locals[1] + locals[2]
}

func main() {
	count := flag.Int("count", 1000000, "how many goroutines")
	depth := flag.Int("depth", 0, "how many calls down they park")
	flag.Parse()

	// One processor, like the one thread of the coroutines.
	runtime.GOMAXPROCS(1)
	wakes := make([]chan uint64, *count)
	answer := make(chan uint64)
	runtime.GC()
	before := now()

	start := time.Now()
	for number := range wakes {
		wake := make(chan uint64)
		wakes[number] = wake
		seed := uint64(number)
		go func() { answer <- parkedAt(wake, answer, *depth, seed) }()
		if <-answer != seed+1 {
			panic("a wrong first answer")
		}
	}
	runtime.Gosched()
	spawn := time.Since(start)
	after := now()

	order := rand.New(rand.NewSource(1)).Perm(*count)
	start = time.Now()
	for _, number := range order {
		wakes[number] <- 5
		seed := uint64(number)
		if <-answer != 5+seed+(seed^1)+(seed^2) {
			panic("a wrong second answer")
		}
	}
	resume := time.Since(start)

	each := func(after, before int) float64 { return float64(after-before) / float64(*count) }
	check(json.NewEncoder(os.Stdout).Encode(map[string]any{
		"count":                 *count,
		"rss_bytes_each":        each(after.resident, before.resident),
		"page_table_bytes_each": each(after.pageTables, before.pageTables),
		"mappings":              after.mappings - before.mappings,
		"spawn_ns_each":         float64(spawn.Nanoseconds()) / float64(*count),
		"resume_ns_each":        float64(resume.Nanoseconds()) / float64(*count),
	}))
}
