/* NVIDIA's management library, as far as llamesh calls it, answering from a text file.

   The file is named by FAKE_NVML and read anew at each call, so that a test changes the machine by replacing
   the file. `fake_nvml.py` writes it and describes its lines. Signatures, structures and error codes are those
   of nvml.h. With OLD_DRIVER defined, the second and third versions of calls are missing, as before R510. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SUCCESS 0
#define UNINITIALIZED 1
#define INVALID_ARGUMENT 2
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7
#define VERSION_MISMATCH 25
#define UNKNOWN 999

#define MAX_DEVICES 32
#define MAX_PROCESSES 256
#define MAX_ERRORS 64

typedef unsigned long long u64;

typedef struct {
    int parent; /* -1: a whole GPU */
    char uuid[96], name[96];
    u64 total, used, reserved;
    unsigned utilisation, mig;
} device_t;

typedef struct {
    int device, graphics;
    unsigned pid;
    u64 used;
} process_t;

typedef struct {
    int init, gone, devices, processes, errors;
    device_t device[MAX_DEVICES];
    process_t process[MAX_PROCESSES];
    struct { int device, code; char call[48]; } error[MAX_ERRORS];
} machine_t;

/* A handle is this plus the place in the file: those of an earlier session are refused. */
static unsigned long session = 0;
static int open_count = 0;

static int read_machine(machine_t *machine) {
    char line[512];
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    memset(machine, 0, sizeof *machine);
    if (!file) return UNKNOWN;
    while (fgets(line, sizeof line, file)) {
        device_t *device = &machine->device[machine->devices];
        process_t *process = &machine->process[machine->processes];
        char kind[16], used[32];
        if (sscanf(line, "init %d", &machine->init) == 1) continue;
        if (sscanf(line, "gone %d", &machine->gone) == 1) continue;
        if (machine->devices < MAX_DEVICES
            && sscanf(line, "device %d %95s %llu %llu %llu %u %u %95[^\n]", &device->parent, device->uuid,
                      &device->total, &device->used, &device->reserved, &device->utilisation, &device->mig,
                      device->name) == 8) {
            machine->devices++;
        } else if (machine->processes < MAX_PROCESSES
                   && sscanf(line, "process %d %15s %u %31s", &process->device, kind, &process->pid, used) == 4) {
            process->graphics = !strcmp(kind, "graphics");
            process->used = !strcmp(used, "unknown") ? ~0ULL : strtoull(used, NULL, 10);
            machine->processes++;
        } else if (machine->errors < MAX_ERRORS
                   && sscanf(line, "error %d %47s %d", &machine->error[machine->errors].device,
                             machine->error[machine->errors].call, &machine->error[machine->errors].code) == 3) {
            machine->errors++;
        }
    }
    fclose(file);
    return SUCCESS;
}

/* What every call begins with: the state of the machine, and the error that was ordered for this call. */
static int begin(machine_t *machine, const char *call, int device) {
    int code = read_machine(machine);
    if (code) return code;
    if (machine->gone) return machine->gone;
    if (!open_count) return UNINITIALIZED;
    for (int i = 0; i < machine->errors; i++)
        if (machine->error[i].device == device && !strcmp(machine->error[i].call, call))
            return machine->error[i].code;
    return SUCCESS;
}

static void *to_handle(int place) { return (void *)(session * 1000 + 1 + (unsigned long)place); }

static int on_device(machine_t *machine, const char *call, void *handle, device_t **device) {
    unsigned long number = (unsigned long)handle - 1 - session * 1000;
    int place = number < MAX_DEVICES ? (int)number : -2;
    int code = begin(machine, call, place);
    if (code) return code;
    if (place < 0 || place >= machine->devices) return INVALID_ARGUMENT;
    *device = &machine->device[place];
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    machine_t machine;
    int code = read_machine(&machine);
    (void)flags;
    if (code) return code;
    if (machine.gone) return machine.gone;
    if (machine.init) return machine.init;
    open_count++;
    session++;
    return SUCCESS;
}

int nvmlShutdown(void) {
    if (!open_count) return UNINITIALIZED;
    open_count--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    static char text[32];
    snprintf(text, sizeof text, "error %d", code);
    return text;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    machine_t machine;
    int code = begin(&machine, "count", -1);
    *count = 0;
    for (int i = 0; !code && i < machine.devices; i++) *count += machine.device[i].parent < 0;
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    machine_t machine;
    int code = begin(&machine, "count", -1);
    if (code) return code;
    for (int i = 0; i < machine.devices; i++)
        if (machine.device[i].parent < 0 && index-- == 0) {
            *handle = to_handle(i);
            return begin(&machine, "handle", i);
        }
    return INVALID_ARGUMENT;
}

static int text(const char *call, void *handle, char *out, unsigned size, int name) {
    machine_t machine;
    device_t *device;
    int code = on_device(&machine, call, handle, &device);
    if (code) return code;
    if (strlen(name ? device->name : device->uuid) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, name ? device->name : device->uuid);
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *handle, char *out, unsigned size) { return text("uuid", handle, out, size, 0); }
int nvmlDeviceGetName(void *handle, char *out, unsigned size) { return text("name", handle, out, size, 1); }

struct memory_1 { u64 total, free, used; };
struct memory_2 { unsigned version; u64 total, reserved, free, used; };

int nvmlDeviceGetMemoryInfo(void *handle, struct memory_1 *out) {
    machine_t machine;
    device_t *device;
    int code = on_device(&machine, "memory", handle, &device);
    if (code) return code;
    out->total = device->total;
    out->used = device->used + device->reserved;
    out->free = out->total - out->used;
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_2 *out) {
    machine_t machine;
    device_t *device;
    int code = on_device(&machine, "memory", handle, &device);
    if (code) return code;
    if (out->version != (sizeof *out | 2u << 24)) return VERSION_MISMATCH;
    out->total = device->total;
    out->used = device->used;
    out->reserved = device->reserved;
    out->free = out->total - out->used - out->reserved;
    return SUCCESS;
}
#endif

int nvmlDeviceGetUtilizationRates(void *handle, unsigned out[2]) {
    machine_t machine;
    device_t *device;
    int code = on_device(&machine, "utilisation", handle, &device);
    if (code) return code;
    out[0] = device->utilisation;
    out[1] = 0;
    return SUCCESS;
}

struct process_info { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; };

static int processes(void *handle, unsigned *count, struct process_info *out, int graphics) {
    machine_t machine;
    device_t *device;
    unsigned room = *count, found = 0;
    int code = on_device(&machine, graphics ? "graphics" : "compute", handle, &device);
    if (code) return code;
    for (int i = 0; i < machine.processes; i++) {
        process_t *process = &machine.process[i];
        if (&machine.device[process->device] != device || process->graphics != graphics) continue;
        if (found < room && out)
            out[found] = (struct process_info){process->pid, process->used, ~0u, ~0u};
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, struct process_info *out) {
    return processes(handle, count, out, 0);
}
int nvmlDeviceGetGraphicsRunningProcesses_v2(void *handle, unsigned *count, struct process_info *out) {
    return processes(handle, count, out, 1);
}
#ifndef OLD_DRIVER
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process_info *out) {
    return processes(handle, count, out, 0);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, struct process_info *out) {
    return processes(handle, count, out, 1);
}
#endif

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    machine_t machine;
    device_t *device;
    int code = on_device(&machine, "mig", handle, &device);
    if (code) return code;
    *current = *pending = device->mig;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    machine_t machine;
    device_t *device;
    int code = on_device(&machine, "mig", handle, &device);
    *count = code ? 0 : 7;
    return code;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **part) {
    machine_t machine;
    device_t *device;
    int code = on_device(&machine, "parts", handle, &device);
    if (code) return code;
    for (int i = 0; i < machine.devices; i++)
        if (machine.device[i].parent == device - machine.device && index-- == 0) {
            *part = to_handle(i);
            return SUCCESS;
        }
    return NOT_FOUND;
}
