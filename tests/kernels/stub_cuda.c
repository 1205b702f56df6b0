/* A CUDA driver that runs nothing. It checks what the documentation of cuLaunchKernelEx and cuTensorMapEncodeTiled demands on
   compute capability 9.0, counts, and says on stderr why it refuses. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef int CUresult;
enum { OK = 0, INVALID_VALUE = 1 };
enum { MAX_SHARED = 232448, MAX_THREADS = 1024, MAX_BOX = 256 };

static long num_launches, num_descriptors;

long stub_launches(void) { return num_launches; }
long stub_descriptors(void) { return num_descriptors; }

static CUresult refuse(const char *why, unsigned long long value) {
    fprintf(stderr, "stub driver: %s: %llu\n", why, value);
    return INVALID_VALUE;
}

/* ---- what Triton asks before a launch ---- */

CUresult cuGetErrorString(CUresult error, const char **text) { *text = error ? "refused by the stub" : "ok"; return OK; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return OK; }
CUresult cuCtxGetCurrent(void **context) { *context = (void *)1; return OK; }
CUresult cuCtxSetCurrent(void *context) { return OK; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 0; return OK; }
CUresult cuCtxSetLimit(int limit, size_t value) { return OK; }
CUresult cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return OK; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return OK; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return OK; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return OK; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? MAX_THREADS : 0;
    return OK;
}
CUresult cuOccupancyMaxActiveClusters(int *number, void *function, const void *config) { *number = 66; return OK; }
CUresult cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
    memcpy(data, &pointer, sizeof pointer);
    return OK;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) { /* CUdevice_attribute */
    case 8: *value = 49152; break;       /* shared memory of a block */
    case 10: *value = 32; break;         /* warp size */
    case 12: *value = 65536; break;      /* registers */
    case 16: *value = 132; break;        /* multiprocessors */
    case 75: *value = 9; break;          /* compute capability */
    case 76: *value = 0; break;
    case 97: *value = MAX_SHARED; break; /* shared memory of a block that asks for it */
    default: *value = 1000000;
    }
    return OK;
}

/* ---- what is checked ---- */

struct config { unsigned grid[3], block[3], shared_bytes; void *stream, *attributes; unsigned num_attributes; };

CUresult cuLaunchKernelEx(const struct config *config, void *function, void **parameters, void **extra) {
    unsigned threads = config->block[0] * config->block[1] * config->block[2];
    num_launches++;
    if (!config->grid[0] || !config->grid[1] || !config->grid[2]) return refuse("an empty grid", 0);
    if (threads == 0 || threads > MAX_THREADS) return refuse("threads of a block", threads);
    if (config->shared_bytes > MAX_SHARED) return refuse("shared memory of a block", config->shared_bytes);
    return OK;
}

CUresult cuTensorMapEncodeTiled(void *map, int dtype, unsigned rank, void *base, const uint64_t *sizes, const uint64_t *strides,
                                const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int l2, int fill) {
    static const int bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}; /* CUtensorMapDataType */
    static const unsigned span_of[] = {1u << 30, 32, 64, 128};           /* CUtensorMapSwizzle */
    unsigned bytes = bytes_of[dtype], inner = box[0] * bytes;
    num_descriptors++;
    if ((uintptr_t)map % 64) return refuse("a descriptor's own address is no multiple of 64", (uintptr_t)map);
    if ((uintptr_t)base % 16) return refuse("the base is no multiple of 16", (uintptr_t)base);
    if (rank < 1 || rank > 5) return refuse("dimensions", rank);
    for (unsigned i = 0; i < rank; i++) {
        if (sizes[i] == 0 || sizes[i] > 1ull << 32) return refuse("a size", sizes[i]);
        if (box[i] == 0 || box[i] > MAX_BOX) return refuse("a side of the box", box[i]);
        if (steps[i] < 1 || steps[i] > 8) return refuse("a step", steps[i]);
    }
    for (unsigned i = 0; i + 1 < rank; i++) { /* strides in bytes, of all dimensions but the first */
        uint64_t least = i ? strides[i - 1] * sizes[i] : sizes[0] * bytes;
        if (strides[i] % 16 || strides[i] >= 1ull << 40) return refuse("a stride", strides[i]);
        if (strides[i] < least) return refuse("rows overlap: stride", strides[i]);
    }
    if (inner % 16 || inner > span_of[swizzle]) return refuse("bytes of the box's rows", inner);
    return OK;
}
