// libnvrtc, emulated: compiles a kernel file with the host's C++ compiler behind the shim, and hands the shared object out as the cubin.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <iterator>
#include <string>
#include <unistd.h>

namespace {
struct Program {
    std::string source, log, image;
};

std::string folder() {
    Dl_info info;
    dladdr((void*)&folder, &info);
    std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/'));
}

std::string read_all(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
}

const int SUCCESS = 0, INVALID_INPUT = 3, COMPILATION = 6;
}  // namespace

#pragma GCC visibility push(default)
extern "C" {
const char* nvrtcGetErrorString(int result) { return result == 0 ? "NVRTC_SUCCESS" : "NVRTC_ERROR_COMPILATION (emulated)"; }

int nvrtcVersion(int* major, int* minor) {
    *major = 0, *minor = 13;
    return SUCCESS;
}

int nvrtcCreateProgram(void** program, const char* source, const char*, int, const char* const*, const char* const*) {
    *program = new Program{source, "", ""};
    return SUCCESS;
}

int nvrtcCompileProgram(void* handle, int count, const char* const* options) {
    Program& program = *(Program*)handle;
    const char* compiler = getenv("CAIRN_EMULATOR_CXX");
    // The machine's own instructions, for fused multiply-adds and half precision.
    std::string command = std::string(compiler ? compiler : "c++") +
                          " -x c++ -std=c++20 -O2 -march=native -ffp-contract=off -fno-gnu-unique -fvisibility=hidden -fPIC -shared"
                          " -U_FORTIFY_SOURCE -fno-stack-protector -w -include '" +
                          folder() + "/shim.h'";
    for (int i = 0; i < count; i++) {
        if (strncmp(options[i], "-D", 2) && strncmp(options[i], "--define-macro=", 15)) continue;
        std::string name = strchr(options[i], options[i][1] == 'D' ? 'D' : '=') + 1;
        if (name.find('\'') != std::string::npos) return INVALID_INPUT;
        command += " '-D" + name + "'";
    }
    char base[] = "/tmp/cairn-emulated-XXXXXX";
    if (!mkdtemp(base)) return COMPILATION;
    std::string dir = base, source = dir + "/kernel.cu", object = dir + "/kernel.so", log = dir + "/log";
    std::ofstream(source) << program.source;
    command += " '" + source + "' -o '" + object + "' 2> '" + log + "'";
    bool good = system(command.c_str()) == 0;
    program.log = read_all(log);
    if (good) {
        std::string object_bytes = read_all(object);
        unsigned long long size = object_bytes.size();
        program.image = "CAIRNEMU" + std::string((char*)&size, 8) + object_bytes;
    }
    for (auto& path : {source, object, log}) unlink(path.c_str());
    rmdir(base);
    return good ? SUCCESS : COMPILATION;
}

int nvrtcGetProgramLogSize(void* program, size_t* size) {
    *size = ((Program*)program)->log.size() + 1;
    return SUCCESS;
}

int nvrtcGetProgramLog(void* program, char* log) {
    strcpy(log, ((Program*)program)->log.c_str());
    return SUCCESS;
}

int nvrtcGetCUBINSize(void* program, size_t* size) {
    *size = ((Program*)program)->image.size();
    return SUCCESS;
}

int nvrtcGetCUBIN(void* program, char* image) {
    memcpy(image, ((Program*)program)->image.data(), ((Program*)program)->image.size());
    return SUCCESS;
}

int nvrtcDestroyProgram(void** program) {
    delete (Program*)*program;
    *program = nullptr;
    return SUCCESS;
}
}
#pragma GCC visibility pop
