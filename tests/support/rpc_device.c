/* A device for llama.cpp's RPC back end: one thread of this machine, and as many bytes of memory as the first argument
   says. It claims to have as many as the second one says.

   An allocation beyond them fails, as on a GPU. llama.cpp's server takes one client after another; here each client gets
   a process of its own, and all of them share the memory. Prints its port, and for each byte of its standard input how
   many bytes are allocated. It ends when its standard input does. */
#define _GNU_SOURCE
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml-rpc.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

static size_t total, claimed;
static size_t *used; /* in memory that all processes share */

/* ggml's objects begin with their functions. These are the numbers of those that are replaced. */
enum { FREE_BUFFER = 0, ALLOCATE_BUFFER = 1, MEMORY = 2 };
static void (*free_buffer)(ggml_backend_buffer_t);
static ggml_backend_buffer_t (*allocate_buffer)(ggml_backend_buffer_type_t, size_t);

static void free_counted(ggml_backend_buffer_t buffer) {
    __atomic_sub_fetch(used, ggml_backend_buffer_get_size(buffer), __ATOMIC_SEQ_CST);
    free_buffer(buffer);
}

static ggml_backend_buffer_t allocate_counted(ggml_backend_buffer_type_t type, size_t size) {
    if (__atomic_add_fetch(used, size, __ATOMIC_SEQ_CST) > total) {
        __atomic_sub_fetch(used, size, __ATOMIC_SEQ_CST);
        return NULL;
    }
    ggml_backend_buffer_t buffer = allocate_buffer(type, size);
    void **functions = (void **)buffer;
    free_buffer = functions[FREE_BUFFER];
    functions[FREE_BUFFER] = free_counted;
    return buffer;
}

static void memory(ggml_backend_dev_t device, size_t *free, size_t *all) {
    *all = claimed;
    *free = claimed - __atomic_load_n(used, __ATOMIC_SEQ_CST);
}

/* Takes the place of libc's in llama.cpp's server. Returns once in each client's process, and never in the first one. */
int accept(int listener, __SOCKADDR_ARG address, socklen_t *restrict length) {
    static bool served;
    if (served)
        _exit(0);
    struct sockaddr_in own;
    socklen_t size = sizeof own;
    getsockname(listener, (struct sockaddr *)&own, &size);
    dprintf(2, "%d\n", ntohs(own.sin_port));
    signal(SIGCHLD, SIG_IGN);
    struct pollfd inputs[] = {{0, POLLIN, 0}, {listener, POLLIN, 0}};
    for (;;) {
        poll(inputs, 2, -1);
        char byte;
        if (inputs[0].revents && read(0, &byte, 1) <= 0)
            _exit(0);
        if (inputs[0].revents)
            dprintf(2, "%zu\n", *used);
        if (!inputs[1].revents)
            continue;
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fork() == 0) {
            served = true;
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            return client;
        }
        close(client);
    }
}

int main(int count, char **arguments) {
    total = strtoull(arguments[1], NULL, 10);
    claimed = strtoull(arguments[2], NULL, 10);
    used = mmap(NULL, sizeof *used, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ggml_backend_dev_t device = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    ((void **)device)[MEMORY] = memory;
    void **type = (void **)ggml_backend_dev_buffer_type(device);
    allocate_buffer = type[ALLOCATE_BUFFER];
    type[ALLOCATE_BUFFER] = allocate_counted;
    ggml_backend_rpc_start_server("127.0.0.1:0", NULL, 1, 1, &device);
}
