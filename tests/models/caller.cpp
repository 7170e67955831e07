// Calls functions of a library for a process of another architecture (foreign.py), which sends the memory that they
// work on and gets it back. `caller LIBRARY` reads calls from stdin and answers on stdout, in the machine's byte order,
// which both processes share (little-endian), until stdin ends.
//
// A call is of 8-byte numbers: the size of the name, the name; how many blocks of memory, for each its size and
// content; how many pointers within blocks, for each (block, offset) of the pointer and (block, offset) of what it
// points to; how many whole arguments, for each (block or −1, offset or value); how many floats, for each its 4 bytes
// as a number; whether a text is returned. The answer: the text's size and content if one is; each block's content.
//
// AArch64 and x86-64 Linux number the registers of whole arguments and of floats apart, and give each argument that has
// no register 8 bytes of the stack. So one function type serves for every order of up to 16 whole arguments and 4 floats.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr size_t WHOLE = 16, FLOATS = 4;
using W = uint64_t;
using Function = W (*)(W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, float, float, float, float);

[[noreturn]] void fail(const std::string& why) {
    std::fprintf(stderr, "%s\n", why.c_str());
    std::exit(1);
}

bool read(void* to, size_t size) { return std::fread(to, 1, size, stdin) == size; }

uint64_t number() {
    uint64_t found;
    if (!read(&found, sizeof found)) fail("a call ends too early");
    return found;
}

void write(const void* from, size_t size) {
    if (std::fwrite(from, 1, size, stdout) != size) fail("an answer can't be written");
}

}  // namespace

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) fail(dlerror());
    uint64_t size;
    while (read(&size, sizeof size)) {
        std::string name(size, ' ');
        read(&name[0], size);
        auto function = reinterpret_cast<Function>(dlsym(library, name.c_str()));
        if (!function) fail(dlerror());
        std::vector<std::vector<char>> blocks(number());
        for (auto& block : blocks) {
            block.resize(number());
            if (!read(block.data(), block.size())) fail("a block ends too early");
        }
        for (uint64_t left = number(); left; left--) {
            uint64_t block = number(), at = number(), target = number();
            char* pointer = blocks.at(target).data() + number();
            std::memcpy(blocks.at(block).data() + at, &pointer, sizeof pointer);
        }
        std::vector<uint64_t> whole(number());
        for (auto& argument : whole) {
            uint64_t block = number(), value = number();
            argument = block == ~uint64_t{} ? value : reinterpret_cast<uint64_t>(blocks.at(block).data() + value);
        }
        std::vector<float> floats(number());
        for (auto& argument : floats) {
            uint32_t bits = uint32_t(number());
            std::memcpy(&argument, &bits, sizeof bits);
        }
        if (whole.size() > WHOLE || floats.size() > FLOATS) fail(name + " has too many arguments");
        whole.resize(WHOLE), floats.resize(FLOATS);
        const auto& w = whole;
        W result = function(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11], w[12], w[13],
                            w[14], w[15], floats[0], floats[1], floats[2], floats[3]);
        if (number()) {
            const char* text = reinterpret_cast<const char*>(result);
            uint64_t length = std::strlen(text);
            write(&length, sizeof length);
            write(text, length);
        }
        for (const auto& block : blocks) write(block.data(), block.size());
        std::fflush(stdout);
    }
}
