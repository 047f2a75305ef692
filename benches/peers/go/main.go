// Goroutines in the shapes of benches/side_by_side.
//
// Reads "shape argument count" lines, runs the shape that often, answers with the nanoseconds of processor time it took:
// of the whole process, which has one processor for Go code and no garbage to collect.
package main

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"syscall"
	"unsafe"
)

func now() int64 {
	const clockProcessCPUTime = 2
	var time syscall.Timespec
	syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockProcessCPUTime, uintptr(unsafe.Pointer(&time)), 0)
	return time.Nano()
}

//go:noinline
func callee() {
	runtime.Gosched()
}

// Goroutines that do nothing but yield; each pass of the caller's runs each of them once.
var yielding int

func yieldTo(goroutines int, inCallee bool, count int64) int64 {
	for ; yielding < goroutines; yielding++ {
		go func() {
			for {
				if inCallee {
					callee()
				} else {
					runtime.Gosched()
				}
			}
		}()
	}
	runtime.Gosched()
	start := now()
	for i := int64(0); i < count; i++ {
		runtime.Gosched()
	}
	return now() - start
}

var finished int

func reused(count int64) int64 {
	start := now()
	for i := int64(0); i < count; i++ {
		go func() { finished++ }()
		runtime.Gosched()
	}
	return now() - start
}

// Goroutines that are all alive at once, wait, and end. Afterwards as many take their place for good, so that the next
// pass finds no used ones.
func fresh(goroutines int, count int64) int64 {
	var time int64
	for i := int64(0); i < count; i++ {
		start := now()
		wait, done := make(chan struct{}), 0
		for j := 0; j < goroutines; j++ {
			go func() {
				<-wait
				done++
			}()
		}
		runtime.Gosched()
		close(wait)
		for done < goroutines {
			runtime.Gosched()
		}
		time += now() - start
		for j := 0; j < goroutines; j++ {
			go func() { select {} }()
		}
		runtime.Gosched()
	}
	return time
}

//go:noinline
func descend(bytes int) int {
	var frame [20]int
	for i := range frame {
		frame[i] = bytes
	}
	if bytes > 0 {
		return descend(bytes-208) + frame[bytes%20]%2
	}
	return frame[7]
}

// New goroutines that need so many bytes of stack.
func grow(bytes int, count int64) int64 {
	start := now()
	for i := int64(0); i < count; i++ {
		go func() { finished += descend(bytes) }()
		runtime.Gosched()
	}
	return now() - start
}

// The same, where all of them stay alive, parked with the stack they have come to. The smaller stacks that one has left on
// its way are used by the next, unless allNew: then others take them before, which is not timed.
func growCold(bytes int, allNew bool, count int64) int64 {
	var time int64
	for i := int64(0); i < count; i++ {
		start := now()
		descendAndPark(bytes)
		time += now() - start
		for smaller := bytes / 2; allNew && smaller > 512; smaller /= 2 {
			descendAndPark(smaller)
		}
	}
	return time
}

func descendAndPark(bytes int) {
	go func() {
		finished += descend(bytes)
		select {}
	}()
	runtime.Gosched()
}

func main() {
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(-1)
	in := bufio.NewReader(os.Stdin)
	for {
		var shape string
		var argument int
		var count, time int64
		if n, _ := fmt.Fscan(in, &shape, &argument, &count); n != 3 {
			return
		}
		switch shape {
		case "root":
			time = yieldTo(1, false, count)
		case "callee":
			time = yieldTo(1, true, count)
		case "many":
			time = yieldTo(argument, false, count)
		case "reused":
			time = reused(count)
		case "new":
			time = fresh(argument, count)
		case "grow":
			time = grow(argument, count)
		case "grow_cold":
			time = growCold(argument, false, count)
		case "grow_all_new":
			time = growCold(argument, true, count)
		}
		fmt.Println(time)
	}
}
