// libcuda, emulated: devices are host memory, and one thread executes what streams were given, as late and in as odd an order as CUDA
// allows.
//
// What it is for: everything that Cairn does with a device runs here without one, and is punished for what a real device would forgive
// most of the time. A forgotten wait between streams shows, because streams take turns at random with pauses between; memory that is freed under
// a copy faults, because every allocation is its own mapping between two pages without access; new memory holds 0xFF, not zeros.
//
// Settings, from the environment: CAIRN_EMULATOR_DEVICES (1), CAIRN_EMULATOR_SEED (0), CAIRN_EMULATOR_LOSE_AFTER (so many operations until the
// device is lost; never), CAIRN_EMULATOR_MIB (memory of a device, 4096), CAIRN_EMULATOR_OLD (1: without cuMemcpyBatchAsync, and without
// registration of what can only be read), CAIRN_EMULATOR_PINS (0: the system lets nobody register memory).

#include "driver.hpp"
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <fcntl.h>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    PEER_ALREADY = 704,
    ECC_UNCORRECTABLE = 214,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILED = 719,
    OPERATING_SYSTEM = 304,
    HOST_MEMORY_ALREADY_REGISTERED = 712,
    HOST_MEMORY_NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801,
};

typedef uint64_t Address;
using Clock = std::chrono::steady_clock;

long setting(const char* name, long otherwise) {
    const char* text = getenv(name);
    return text ? atol(text) : otherwise;
}

struct Event {
    uint64_t recorded = 0, done = 0;
    Clock::time_point at;
};

struct Work {
    std::function<int()> run;
    Event* waits_for = nullptr;
    uint64_t generation = 0;
};

struct Stream {
    std::deque<Work> queue;
    bool busy = false, capturing = false, dead = false;
    std::vector<std::function<int()>> captured;
    int device = 0;
};

struct Allocation {
    char* mapping;
    size_t mapped, bytes;
    int file, device;
};

struct Graph {
    std::vector<std::function<int()>> work;
};

struct Module {
    void* library;
    const char* (*launch)(const char*, const unsigned*, const unsigned*, void**, uint64_t);
    size_t (*kernel)(const char*);
    int device;
};

struct Function {
    Module* module;
    std::string name;
    size_t bytes;
};

const size_t PAGE = 4096;

struct Emulator {
    std::mutex lock;
    std::condition_variable work, progress;
    std::set<Stream*> streams;
    std::map<Address, Allocation> memory;
    std::map<Address, size_t> registered;
    std::vector<size_t> used;
    std::mt19937_64 random{(uint64_t)setting("CAIRN_EMULATOR_SEED", 0)};
    long lose_after = setting("CAIRN_EMULATOR_LOSE_AFTER", -1), executed = 0;
    int failed = SUCCESS;
    bool started = false;

    // The executor lives as long as the process: nothing joins it.
    void start() {
        if (started) return;
        started = true;
        std::thread([this] { execute(); }).detach();
    }

    bool ready(Stream* stream) {
        if (stream->busy || stream->queue.empty()) return false;
        Work& front = stream->queue.front();
        return !front.waits_for || front.waits_for->done >= front.generation || failed;
    }

    void execute() {
        std::unique_lock guard(lock);
        for (;;) {
            std::vector<Stream*> ready_streams;
            for (Stream* stream : streams)
                if (ready(stream)) ready_streams.push_back(stream);
            if (ready_streams.empty()) {
                work.wait(guard);
                continue;
            }
            if (random() % 8 == 0) {
                auto pause = std::chrono::microseconds(random() % 200);
                guard.unlock();
                std::this_thread::sleep_for(pause);
                guard.lock();
                continue;
            }
            Stream* stream = ready_streams[random() % ready_streams.size()];
            Work item = std::move(stream->queue.front());
            stream->queue.pop_front();
            stream->busy = true;
            if (lose_after >= 0 && executed++ >= lose_after) failed = ECC_UNCORRECTABLE;
            if (!failed) {
                guard.unlock();
                int result = item.run ? item.run() : SUCCESS;
                guard.lock();
                if (result) failed = result;
            }
            stream->busy = false;
            if (stream->dead && stream->queue.empty()) {
                streams.erase(stream);
                delete stream;
            }
            progress.notify_all();
        }
    }

    int push(Stream* stream, Work item) {
        std::unique_lock guard(lock);
        if (failed) return failed;
        if (stream->capturing) {
            if (item.waits_for) return INVALID_VALUE;
            stream->captured.push_back(std::move(item.run));
            return SUCCESS;
        }
        start();
        stream->queue.push_back(std::move(item));
        work.notify_one();
        return SUCCESS;
    }
};

// Never destroyed: the executor may still run when the process ends.
Emulator& emulator() {
    static Emulator* all = new Emulator;
    return *all;
}

int devices() { return (int)setting("CAIRN_EMULATOR_DEVICES", 1); }

thread_local int current = -1;

int allocate(Address* at, size_t bytes, int device) {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    if (e.failed) return e.failed;
    if (!bytes) return INVALID_VALUE;
    if (e.used.size() < (size_t)devices()) e.used.resize(devices());
    size_t limit = (size_t)setting("CAIRN_EMULATOR_MIB", 4096) << 20;
    if (device >= 0 && e.used[device] + bytes > limit) return OUT_OF_MEMORY;
    size_t rounded = (bytes + PAGE - 1) / PAGE * PAGE;
    int file = memfd_create("cairn-emulated", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, rounded)) return OUT_OF_MEMORY;
    char* mapping = (char*)mmap(nullptr, rounded + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    mmap(mapping + PAGE, rounded, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
    memset(mapping + PAGE, 0xff, rounded);
    // The end touches the page behind, so that one element too many faults.
    *at = (Address)(mapping + PAGE + rounded - (bytes + 15) / 16 * 16);
    e.memory[*at] = Allocation{mapping, rounded + 2 * PAGE, bytes, file, device};
    if (device >= 0) e.used[device] += bytes;
    return SUCCESS;
}

int release(Address at) {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    auto found = e.memory.find(at);
    if (found == e.memory.end()) return INVALID_VALUE;
    Allocation a = found->second;
    e.memory.erase(found);
    if (a.device >= 0) e.used[a.device] -= a.bytes;
    munmap(a.mapping, a.mapped);
    close(a.file);
    return SUCCESS;
}

int copy(Stream* stream, Address to, Address from, size_t bytes) {
    return emulator().push(stream, Work{[=] {
                               memmove((void*)to, (void*)from, bytes);
                               return (int)SUCCESS;
                           }});
}

struct IpcHandle {
    char magic[8];
    int process, file;
    uint64_t bytes;
};
static_assert(sizeof(IpcHandle) <= 64);

struct Opened {
    void* mapping;
    size_t mapped, bytes;
};

std::map<Address, Opened>& opened() {
    static auto* all = new std::map<Address, Opened>;
    return *all;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cairn_emulator_enqueue(void* stream, std::function<int()>* work) {
    return emulator().push((Stream*)stream, Work{std::move(*work)});
}

API cuInit(unsigned) { return devices() > 0 ? SUCCESS : NO_DEVICE; }
API cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
API cuDeviceGetCount(int* count) { return *count = devices(), SUCCESS; }
API cuDeviceGet(int* device, int ordinal) { return ordinal < 0 || ordinal >= devices() ? INVALID_DEVICE : (*device = ordinal, SUCCESS); }
API cuDeviceGetName(char* name, int length, int device) { return snprintf(name, length, "Emulated device %d", device), SUCCESS; }
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = (size_t)setting("CAIRN_EMULATOR_MIB", 4096) << 20, SUCCESS; }

API cuDeviceGetUuid_v2(char* uuid, int device) { return memset(uuid, 0, 16), uuid[0] = 'E', uuid[15] = (char)device, SUCCESS; }
API cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

API cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case 16: return *value = 4, SUCCESS;             // multiprocessors
        case 33: return *value = 0x10 + device, SUCCESS;  // PCI bus
        case 34: return *value = 0, SUCCESS;              // PCI device
        case 50: return *value = 0, SUCCESS;              // PCI domain
        case 75: return *value = 9, SUCCESS;              // compute capability
        case 76: return *value = 0, SUCCESS;
        case 91: return *value = 1, SUCCESS;                                        // registered memory under its host address
        case 113: return *value = !setting("CAIRN_EMULATOR_OLD", 0), SUCCESS;  // read-only registration
        default: return *value = 0, SUCCESS;
    }
}

API cuDeviceCanAccessPeer(int* can, int a, int b) { return *can = a != b, SUCCESS; }
API cuCtxEnablePeerAccess(void*, unsigned) { return SUCCESS; }

API cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)(uintptr_t)(device + 1), SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuDevicePrimaryCtxRelease(int) { return SUCCESS; }
API cuCtxSetCurrent(void* context) { return current = (int)(uintptr_t)context - 1, SUCCESS; }
API cuCtxGetCurrent(void** context) { return *context = (void*)(uintptr_t)(current + 1), SUCCESS; }
API cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, SUCCESS; }
API cuCtxSynchronize() {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    e.progress.wait(guard, [&] {
        for (Stream* stream : e.streams)
            if (stream->busy || (!stream->queue.empty() && !e.failed)) return false;
        return true;
    });
    return e.failed;
}

API cuMemGetInfo_v2(size_t* available, size_t* total) {
    *total = (size_t)setting("CAIRN_EMULATOR_MIB", 4096) << 20;
    std::unique_lock guard(emulator().lock);
    auto& used = emulator().used;
    *available = *total - (current >= 0 && (size_t)current < used.size() ? used[current] : 0);
    return SUCCESS;
}

API cuStreamCreateWithPriority(void** stream, unsigned, int) {
    if (current < 0) return INVALID_CONTEXT;
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    if (e.failed) return e.failed;
    Stream* made = new Stream;
    made->device = current;
    e.streams.insert(made);
    *stream = made;
    return SUCCESS;
}

API cuStreamDestroy_v2(Stream* stream) {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    if (stream->queue.empty() && !stream->busy) {
        e.streams.erase(stream);
        delete stream;
    } else {
        stream->dead = true;
    }
    return SUCCESS;
}

API cuStreamSynchronize(Stream* stream) {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    e.progress.wait(guard, [&] { return (stream->queue.empty() && !stream->busy) || e.failed; });
    return e.failed;
}

API cuEventCreate(Event** event, unsigned) { return *event = new Event, SUCCESS; }
API cuEventDestroy_v2(Event* event) {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    // Work that names it may still be queued; the real thing keeps it alive too.
    e.progress.wait(guard, [&] { return event->done >= event->recorded || e.failed; });
    if (!e.failed) delete event;
    return SUCCESS;
}

API cuEventRecord(Event* event, Stream* stream) {
    uint64_t generation;
    {
        std::unique_lock guard(emulator().lock);
        generation = ++event->recorded;
    }
    return emulator().push(stream, Work{[=] {
                               std::unique_lock guard(emulator().lock);
                               event->done = generation;
                               event->at = Clock::now();
                               emulator().work.notify_one();
                               return (int)SUCCESS;
                           }});
}

API cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    uint64_t generation;
    {
        std::unique_lock guard(emulator().lock);
        generation = event->recorded;
    }
    return emulator().push(stream, Work{nullptr, event, generation});
}

API cuEventSynchronize(Event* event) {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    uint64_t generation = event->recorded;
    e.progress.wait(guard, [&] { return event->done >= generation || e.failed; });
    return event->done >= generation ? SUCCESS : e.failed;
}

API cuEventQuery(Event* event) {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    if (event->done >= event->recorded) return SUCCESS;
    return e.failed ? e.failed : NOT_READY;
}

API cuEventElapsedTime_v2(float* ms, Event* start, Event* end) {
    std::unique_lock guard(emulator().lock);
    *ms = std::chrono::duration<float, std::milli>(end->at - start->at).count();
    return SUCCESS;
}
API cuEventElapsedTime(float* ms, Event* start, Event* end) { return cuEventElapsedTime_v2(ms, start, end); }

API cuMemAlloc_v2(Address* at, size_t bytes) { return current < 0 ? INVALID_CONTEXT : allocate(at, bytes, current); }
API cuMemFree_v2(Address at) { return release(at); }
API cuMemHostAlloc(void** at, size_t bytes, unsigned) { return allocate((Address*)at, bytes, -1); }
API cuMemFreeHost(void* at) { return release((Address)at); }

API cuMemHostRegister_v2(void* at, size_t bytes, unsigned flags) {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    if (e.failed) return e.failed;
    if (!setting("CAIRN_EMULATOR_PINS", 1)) return OPERATING_SYSTEM;
    if ((flags & 8) && setting("CAIRN_EMULATOR_OLD", 0)) return NOT_SUPPORTED;
    if ((Address)at % PAGE || bytes % PAGE || !bytes) return INVALID_VALUE;
    for (auto& [start, length] : e.registered)
        if (start < (Address)at + bytes && (Address)at < start + length) return HOST_MEMORY_ALREADY_REGISTERED;
    e.registered[(Address)at] = bytes;
    return SUCCESS;
}

API cuMemHostUnregister(void* at) {
    std::unique_lock guard(emulator().lock);
    return emulator().registered.erase((Address)at) ? SUCCESS : HOST_MEMORY_NOT_REGISTERED;
}

API cuMemHostGetDevicePointer_v2(Address* device, void* host, unsigned) { return *device = (Address)host, SUCCESS; }

API cuMemGetAddressRange_v2(Address* base, size_t* size, Address at) {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    auto shared = opened().find(at);
    if (shared != opened().end()) return *base = at, *size = shared->second.bytes, SUCCESS;
    auto found = e.memory.upper_bound(at);
    if (found == e.memory.begin()) return NOT_FOUND;
    --found;
    return *base = found->first, *size = found->second.bytes, SUCCESS;
}

API cuMemcpyAsync(Address to, Address from, size_t bytes, Stream* stream) { return copy(stream, to, from, bytes); }
API cuMemcpyHtoDAsync_v2(Address to, void* from, size_t bytes, Stream* stream) { return copy(stream, to, (Address)from, bytes); }
API cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream* stream) { return copy(stream, (Address)to, from, bytes); }

// All of a batch in an order of its own.
API cuMemcpyBatchAsync_v2(Address* to, Address* from, size_t* bytes, size_t count, void*, size_t*, size_t, Stream* stream) {
    if (setting("CAIRN_EMULATOR_OLD", 0)) return NOT_FOUND;
    struct One {
        Address to, from;
        size_t bytes;
    };
    std::vector<One> all;
    for (size_t i = 0; i < count; i++) all.push_back({to[i], from[i], bytes[i]});
    return emulator().push(stream, Work{[all]() mutable {
                               std::mt19937_64 random(all.size());
                               for (size_t i = all.size(); i > 1; i--) std::swap(all[i - 1], all[random() % i]);
                               for (auto& one : all) memmove((void*)one.to, (void*)one.from, one.bytes);
                               return (int)SUCCESS;
                           }});
}

API cuMemsetD8Async(Address at, unsigned char value, size_t bytes, Stream* stream) {
    return emulator().push(stream, Work{[=] {
                               memset((void*)at, value, bytes);
                               return (int)SUCCESS;
                           }});
}

API cuModuleLoadData(Module** module, const void* image) {
    if (memcmp(image, "CAIRNEMU", 8)) return INVALID_IMAGE;
    uint64_t size;
    memcpy(&size, (const char*)image + 8, 8);
    int file = memfd_create("cairn-kernel", MFD_CLOEXEC);
    if (file < 0 || write(file, (const char*)image + 16, size) != (ssize_t)size) return OUT_OF_MEMORY;
    // The same object loaded twice must be two: it has state.
    std::string path = "/proc/self/fd/" + std::to_string(file);
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "emulated module: %s\n", dlerror());
        return INVALID_IMAGE;
    }
    Module* made = new Module{library, nullptr, nullptr, current};
    made->launch = (decltype(made->launch))dlsym(library, "cairn_emulated_launch");
    made->kernel = (decltype(made->kernel))dlsym(library, "cairn_emulated_kernel");
    *module = made;
    return SUCCESS;
}

API cuModuleUnload(Module*) { return SUCCESS; }

API cuModuleGetFunction(Function** function, Module* module, const char* name) {
    size_t bytes = module->kernel(name);
    if (!bytes) return NOT_FOUND;
    *function = new Function{module, name, bytes};
    return SUCCESS;
}

API cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* size) {
    if (index) return INVALID_VALUE;
    *offset = 0, *size = function->bytes;
    return SUCCESS;
}

API cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, Stream* stream,
                   void** params, void**) {
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || shared) return INVALID_VALUE;
    std::string argument((const char*)params[0], f->bytes);
    uint64_t seed;
    {
        std::unique_lock guard(emulator().lock);
        seed = emulator().random();
    }
    return emulator().push(stream, Work{[=]() mutable {
                               unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
                               alignas(16) char copied[512];
                               memcpy(copied, argument.data(), argument.size());
                               void* arguments[1] = {copied};
                               const char* failure = f->module->launch(f->name.c_str(), grid, block, arguments, seed);
                               if (failure) fprintf(stderr, "emulated kernel %s: %s\n", f->name.c_str(), failure);
                               return (int)(failure ? LAUNCH_FAILED : SUCCESS);
                           }});
}

API cuStreamBeginCapture_v2(Stream* stream, int) {
    std::unique_lock guard(emulator().lock);
    stream->capturing = true;
    stream->captured.clear();
    return SUCCESS;
}

API cuStreamEndCapture(Stream* stream, Graph** graph) {
    std::unique_lock guard(emulator().lock);
    stream->capturing = false;
    *graph = new Graph{std::move(stream->captured)};
    return SUCCESS;
}

API cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) { return *executable = new Graph(*graph), SUCCESS; }
API cuGraphDestroy(Graph* graph) { return delete graph, SUCCESS; }
API cuGraphExecDestroy(Graph* graph) { return delete graph, SUCCESS; }
API cuGraphLaunch(Graph* graph, Stream* stream) {
    return emulator().push(stream, Work{[work = graph->work]() mutable {
                               for (auto& each : work)
                                   if (int result = each()) return result;
                               return (int)SUCCESS;
                           }});
}

API cuIpcGetMemHandle(void* handle, Address at) {
    Emulator& e = emulator();
    std::unique_lock guard(e.lock);
    auto found = e.memory.find(at);
    if (found == e.memory.end() || found->second.device < 0) return INVALID_VALUE;
    IpcHandle made{"EMULIPC", (int)getpid(), found->second.file, found->second.bytes};
    memset(handle, 0, 64);
    memcpy(handle, &made, sizeof(made));
    return SUCCESS;
}

struct Handle64 {
    char bytes[64];
};

API cuIpcOpenMemHandle_v2(Address* at, Handle64 handle, unsigned) {
    IpcHandle wanted;
    memcpy(&wanted, handle.bytes, sizeof(wanted));
    if (strcmp(wanted.magic, "EMULIPC")) return INVALID_VALUE;
    // As with CUDA: not within the process that exported it.
    if (wanted.process == (int)getpid()) return INVALID_CONTEXT;
    std::string path = "/proc/" + std::to_string(wanted.process) + "/fd/" + std::to_string(wanted.file);
    int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (file < 0) return INVALID_HANDLE;
    size_t rounded = (wanted.bytes + PAGE - 1) / PAGE * PAGE;
    char* mapping = (char*)mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    *at = (Address)(mapping + rounded - (wanted.bytes + 15) / 16 * 16);
    std::unique_lock guard(emulator().lock);
    opened()[*at] = Opened{mapping, rounded, wanted.bytes};
    return SUCCESS;
}

API cuIpcCloseMemHandle(Address at) {
    std::unique_lock guard(emulator().lock);
    auto found = opened().find(at);
    if (found == opened().end()) return INVALID_VALUE;
    munmap(found->second.mapping, found->second.mapped);
    opened().erase(found);
    return SUCCESS;
}

API cuGetErrorName(int error, const char** name) {
    switch (error) {
        case SUCCESS: return *name = "CUDA_SUCCESS", SUCCESS;
        case OUT_OF_MEMORY: return *name = "CUDA_ERROR_OUT_OF_MEMORY", SUCCESS;
        case NO_DEVICE: return *name = "CUDA_ERROR_NO_DEVICE", SUCCESS;
        case ECC_UNCORRECTABLE: return *name = "CUDA_ERROR_ECC_UNCORRECTABLE", SUCCESS;
        case LAUNCH_FAILED: return *name = "CUDA_ERROR_LAUNCH_FAILED", SUCCESS;
        default: return *name = "CUDA_ERROR (emulated)", SUCCESS;
    }
}
API cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }
