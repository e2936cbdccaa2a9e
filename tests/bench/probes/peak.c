/* How many operations a second the cores can do, out of registers: prints billions for fp32, bf16 and int8.
 *
 * One multiplication with its addition counts as two. The fastest instruction that the compiler may use counts: AMX
 * tiles, else AVX-512 dot products, else fused multiply-add; 0 where there is none for the precision. */
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM of arch_prctl */
#define TILE_DATA 18
#define ROUNDS 4
#define CHAINS 12 /* independent accumulators: latency of 4 cycles times 2 ports, and some more */

typedef double Kernel(long repetitions);

static volatile float sink; /* results that are used cannot be left out */

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

#if defined(__AVX512F__)
typedef __m512 Vector;
#define LANES 16
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#define FILLED(x) _mm512_set1_ps(x)
#else
typedef __m256 Vector;
#define LANES 8
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define FILLED(x) _mm256_set1_ps(x)
#endif

static double fp32(long repetitions) {
    Vector sums[CHAINS], factor = FILLED(0.9999f), term = FILLED(0.0001f);
    for (int chain = 0; chain < CHAINS; chain++)
        sums[chain] = FILLED((float)chain);
    for (long repetition = 0; repetition < repetitions; repetition++)
#pragma GCC unroll 12
        for (int chain = 0; chain < CHAINS; chain++)
            sums[chain] = MULTIPLY_ADD(sums[chain], factor, term);
    for (int chain = 0; chain < CHAINS; chain++)
        sink = sums[chain][0];
    return 2.0 * LANES * CHAINS * (double)repetitions;
}

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
/* Eight tiles of 16 rows of 64 bytes. Not filled in by code: the compiler thinks that only its first bytes are read. */
static const struct {
    unsigned char palette, start_row, reserved[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
} TILES __attribute__((aligned(64))) = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static void configure_tiles(void) {
    _tile_loadconfig(&TILES);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
}

static double bf16(long repetitions) {
    configure_tiles();
    for (long repetition = 0; repetition < repetitions / 4; repetition++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 4.0 * 2 * 16 * 16 * 32 * (double)(repetitions / 4);
}

static double int8(long repetitions) {
    configure_tiles();
    for (long repetition = 0; repetition < repetitions / 4; repetition++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
    return 4.0 * 2 * 16 * 16 * 64 * (double)(repetitions / 4);
}
#else
#if defined(__AVX512BF16__)
static double bf16(long repetitions) {
    __m512 sums[CHAINS];
    __m512bh one = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (int chain = 0; chain < CHAINS; chain++)
        sums[chain] = _mm512_set1_ps((float)chain);
    for (long repetition = 0; repetition < repetitions; repetition++)
#pragma GCC unroll 12
        for (int chain = 0; chain < CHAINS; chain++)
            sums[chain] = _mm512_dpbf16_ps(sums[chain], one, one);
    for (int chain = 0; chain < CHAINS; chain++)
        sink = sums[chain][0];
    return 2.0 * 32 * CHAINS * (double)repetitions;
}
#else
#define bf16 NULL
#endif
#if defined(__AVX512VNNI__)
static double int8(long repetitions) {
    __m512i sums[CHAINS], one = _mm512_set1_epi32(0x01010101);
    for (int chain = 0; chain < CHAINS; chain++)
        sums[chain] = _mm512_set1_epi32(chain);
    for (long repetition = 0; repetition < repetitions; repetition++)
#pragma GCC unroll 12
        for (int chain = 0; chain < CHAINS; chain++)
            sums[chain] = _mm512_dpbusd_epi32(sums[chain], one, one);
    for (int chain = 0; chain < CHAINS; chain++)
        sink = (float)sums[chain][0];
    return 2.0 * 64 * CHAINS * (double)repetitions;
}
#else
#define int8 NULL
#endif
#endif

static Kernel *kernel;
static pthread_barrier_t barrier;

static void *run(void *repetitions) {
    pthread_barrier_wait(&barrier);
    kernel((long)repetitions);
    return NULL;
}

static double rate(Kernel *measured, int threads) {
    double best = 0;
    if (measured == NULL)
        return 0;
    kernel = measured;
    for (int round = 0; round < ROUNDS; round++) {
        pthread_t others[64];
        long repetitions = 1000000;
        pthread_barrier_init(&barrier, NULL, (unsigned)threads);
        for (int number = 1; number < threads; number++)
            pthread_create(&others[number], NULL, run, (void *)repetitions);
        pthread_barrier_wait(&barrier);
        double begin = now();
        double operations = threads * kernel(repetitions);
        for (int number = 1; number < threads; number++)
            pthread_join(others[number], NULL);
        double reached = operations / (now() - begin) / 1e9;
        best = reached > best ? reached : best;
        pthread_barrier_destroy(&barrier);
    }
    return best;
}

int main(int count, char **arguments) {
    int threads = count > 1 ? atoi(arguments[1]) : 2;
    if (threads < 1 || threads > 64)
        return 2;
    syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
    printf("%.0f", rate(fp32, threads));
    printf(" %.0f", rate(bf16, threads));
    printf(" %.0f\n", rate(int8, threads));
    return 0;
}
