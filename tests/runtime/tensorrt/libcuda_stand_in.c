/* The calls of cuda.h that runtime/tensorrt/driver.py makes, over the memory of the process. What is copied to the host
   arrives when the stream is waited for, not before. live() counts what was made and not freed. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef void *CUcontext, *CUstream, *CUgraph, *CUgraphExec;
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_CURRENT = 201, UNSUPPORTED = 900 };

static int objects, current, capturing, launches, refuse_capture;
static struct { void *to; const void *from; size_t size; } pending[64];
static int waiting;

int live(void) { return objects; }
int launched(void) { return launches; }
void refuse(int captures) { refuse_capture = captures; }
void lose_context(void) { current = 0; }

CUresult cuInit(unsigned int flags) { return flags ? INVALID : OK; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = 5 + index; return index ? INVALID : OK; }
CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : -1;
    return device == 5 ? OK : INVALID;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = &objects; objects++; return device == 5 ? OK : INVALID; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { objects--; return device == 5 ? OK : INVALID; }
CUresult cuCtxSetCurrent(CUcontext context) { current = context == &objects; return current ? OK : INVALID; }
CUresult cuStreamCreate(CUstream *stream, unsigned int flags) { *stream = &waiting; objects++; return flags == 1 ? OK : INVALID; }
CUresult cuStreamDestroy_v2(CUstream stream) { objects--; return stream == &waiting ? OK : INVALID; }
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    if (!current) return NOT_CURRENT;
    if (size > (size_t)1 << 40) return OUT_OF_MEMORY;
    *address = (CUdeviceptr)(uintptr_t)malloc(size);
    objects++;
    return OK;
}
CUresult cuMemFree_v2(CUdeviceptr address) { free((void *)(uintptr_t)address); objects--; return OK; }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    memcpy((void *)(uintptr_t)to, from, size);
    return stream == &waiting ? OK : INVALID;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    pending[waiting].to = to, pending[waiting].from = (void *)(uintptr_t)from, pending[waiting].size = size, waiting++;
    return stream == &waiting ? OK : INVALID;
}
CUresult cuStreamSynchronize(CUstream stream) {
    for (; waiting; waiting--) memcpy(pending[waiting - 1].to, pending[waiting - 1].from, pending[waiting - 1].size);
    return stream == &waiting ? OK : INVALID;
}
CUresult cuStreamBeginCapture_v2(CUstream stream, int mode) { capturing = 1; return stream == &waiting && mode == 1 ? OK : INVALID; }
CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    capturing = 0, *graph = NULL;
    if (refuse_capture) return UNSUPPORTED;
    *graph = &capturing, objects++;
    return stream == &waiting ? OK : INVALID;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *ready, CUgraph graph, unsigned long long flags) {
    *ready = &launches, objects++;
    return graph == &capturing && !flags ? OK : INVALID;
}
CUresult cuGraphDestroy(CUgraph graph) { objects--; return graph == &capturing ? OK : INVALID; }
CUresult cuGraphExecDestroy(CUgraphExec ready) { objects--; return ready == &launches ? OK : INVALID; }
CUresult cuGraphLaunch(CUgraphExec ready, CUstream stream) { launches++; return ready == &launches && stream == &waiting ? OK : INVALID; }
CUresult cuGetErrorString(CUresult status, const char **text) {
    *text = status == OUT_OF_MEMORY ? "out of memory" : status == NOT_CURRENT ? "invalid device context" : "invalid argument";
    return OK;
}
