// Boost.Context in the shapes of benches/side_by_side, by its lowest layer, fcontext.
//
// Reads "shape argument count" lines, runs the shape that often, answers with the nanoseconds of processor time it took.

#include <boost/context/detail/fcontext.hpp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <sys/mman.h>
#include <vector>

using namespace boost::context::detail;

static uint64_t now() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

// A stack with a guard page, as boost::context::protected_fixedsize_stack makes it.
static void *new_stack(size_t size) {
    char *at = (char *)mmap(nullptr, size + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(at, 4096, PROT_NONE);
    return at + 4096 + size;
}

static const size_t SIZE = 16 << 10;

static void root(transfer_t from) {
    for (;;) from = jump_fcontext(from.fctx, from.data);
}

__attribute__((noinline)) static transfer_t callee(transfer_t from) {
    transfer_t next = jump_fcontext(from.fctx, from.data);
    asm volatile("" ::: "memory");
    return next;
}

static void calling(transfer_t from) {
    for (;;) from = callee(from);
}

static void once(transfer_t from) {
    jump_fcontext(from.fctx, from.data);
    abort();
}

// Suspends once, then ends.
static void twice(transfer_t from) {
    from = jump_fcontext(from.fctx, from.data);
    jump_fcontext(from.fctx, from.data);
    abort();
}

static uint64_t loop(void (*body)(transfer_t), uint64_t count) {
    static std::map<void *, fcontext_t> known;
    fcontext_t &context = known[(void *)body];
    if (!context) context = make_fcontext(new_stack(SIZE), SIZE, body);
    fcontext_t at = context;
    uint64_t start = now();
    for (uint64_t i = 0; i < count; i++) at = jump_fcontext(at, (void *)i).fctx;
    uint64_t time = now() - start;
    context = at;
    return time;
}

static uint64_t many(size_t contexts, bool shuffled, uint64_t count) {
    static std::vector<fcontext_t> all;
    static std::vector<uint32_t> order;
    if (all.empty()) {
        uint64_t random = 0x2545f4914f6cdd1dull;
        for (size_t i = 0; i < contexts; i++) {
            all.push_back(make_fcontext(new_stack(SIZE), SIZE, root));
            order.push_back(i);
        }
        for (size_t last = contexts - 1; shuffled && last > 0; last--) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            std::swap(order[last], order[random % (last + 1)]);
        }
    }
    uint64_t start = now();
    for (uint64_t pass = 0; pass < count; pass++)
        for (uint32_t index : order) all[index] = jump_fcontext(all[index], nullptr).fctx;
    return now() - start;
}

static uint64_t reused(uint64_t count) {
    static void *stack = new_stack(SIZE);
    uint64_t start = now();
    for (uint64_t i = 0; i < count; i++) jump_fcontext(make_fcontext(stack, SIZE, once), nullptr);
    return now() - start;
}

static uint64_t fresh(size_t contexts, uint64_t count) {
    uint64_t time = 0;
    std::vector<void *> stacks(contexts);
    std::vector<fcontext_t> all(contexts);
    for (uint64_t pass = 0; pass < count; pass++) {
        uint64_t start = now();
        for (size_t i = 0; i < contexts; i++) {
            stacks[i] = new_stack(SIZE);
            all[i] = jump_fcontext(make_fcontext(stacks[i], SIZE, twice), nullptr).fctx;
        }
        for (size_t i = 0; i < contexts; i++) jump_fcontext(all[i], nullptr);
        for (void *stack : stacks) munmap((char *)stack - SIZE - 4096, SIZE + 4096);
        time += now() - start;
    }
    return time;
}

int main() {
    char shape[32];
    unsigned long argument, count;
    while (scanf("%31s %lu %lu", shape, &argument, &count) == 3) {
        uint64_t time = 0;
        if (!strcmp(shape, "root")) time = loop(root, count);
        if (!strcmp(shape, "callee")) time = loop(calling, count);
        if (!strcmp(shape, "many")) time = many(argument, false, count);
        if (!strcmp(shape, "shuffled")) time = many(argument, true, count);
        if (!strcmp(shape, "reused")) time = reused(count);
        if (!strcmp(shape, "new")) time = fresh(argument, count);
        printf("%lu\n", (unsigned long)time);
        fflush(stdout);
    }
}
