/* How fast memory is read: each line "BYTES" on standard input is answered with gigabytes per second.
 *
 * Two threads (argument) sum disjoint halves of a set of that size, over and over for at least 60 ms; the best pass
 * counts. Waits without computing between the lines. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define LARGEST ((size_t)1 << 29) /* bytes */
#define SECONDS 0.06

static const uint64_t *data;
static size_t words;
static int threads, passes;
static pthread_barrier_t barrier;
static double best;
static volatile uint64_t sink;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static uint64_t sum(const uint64_t *part, size_t count) {
    uint64_t lanes[32] = {0}, total = 0; /* four independent vectors of 64 bytes */
    for (size_t at = 0; at < count; at += 32)
        for (int lane = 0; lane < 32; lane++)
            lanes[lane] += part[at + (size_t)lane];
    for (int lane = 0; lane < 32; lane++)
        total += lanes[lane];
    return total;
}

static void *read_part(void *number) {
    size_t share = words / (size_t)threads / 32 * 32;
    const uint64_t *part = data + (size_t)(intptr_t)number * share;
    for (int pass = 0; pass < passes; pass++) {
        pthread_barrier_wait(&barrier);
        double begin = now();
        sink = sum(part, share);
        pthread_barrier_wait(&barrier);
        double rate = (double)(share * (size_t)threads * sizeof *data) / (now() - begin) / 1e9;
        if (number == NULL && rate > best)
            best = rate;
    }
    return NULL;
}

static void measure(int count) {
    pthread_t others[64];
    passes = count;
    best = 0;
    for (int number = 1; number < threads; number++)
        pthread_create(&others[number], NULL, read_part, (void *)(intptr_t)number);
    read_part(NULL);
    for (int number = 1; number < threads; number++)
        pthread_join(others[number], NULL);
}

int main(int count, char **arguments) {
    threads = count > 1 ? atoi(arguments[1]) : 2;
    if (threads < 1 || threads > 64)
        return 2;
    void *memory = aligned_alloc((size_t)1 << 21, LARGEST);
    if (memory == NULL)
        return 1;
#ifdef MADV_HUGEPAGE
    madvise(memory, LARGEST, MADV_HUGEPAGE); /* with pages of 4 KiB a third less is read */
#endif
    memset(memory, 1, LARGEST);
    data = memory;
    pthread_barrier_init(&barrier, NULL, (unsigned)threads);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        size_t bytes = strtoull(line, NULL, 10);
        words = (bytes > LARGEST ? LARGEST : bytes) / sizeof *data;
        measure(1);
        measure(1 + (int)(SECONDS * best * 1e9 / (double)(words * sizeof *data)));
        printf("%.2f\n", best);
        fflush(stdout);
    }
    return 0;
}
