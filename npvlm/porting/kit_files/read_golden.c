/* Check a dump against a golden, in C99 with no libraries.

       read_golden GOLDEN.safetensors MINE.safetensors    every stage that both have
       read_golden GOLDEN.safetensors STAGE MINE.f32      one stage, raw float32, low byte first

   It prints OK, or the first number that differs, stages in the order of the golden. It ends with 0
   (the same), 1 (different) or 2 (bad use, or a file that cannot be read). Names and layouts have to
   be the golden's, and numbers computed in float32; `npvlm compare` takes others. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of the root mean square of a stage: far above what float32 rounds off, below any mistake. */
static const double LIMIT = 1e-4;

typedef struct {
    char name[256], dtype[8];
    size_t count; /* of numbers */
    const unsigned char *data;
} Stage;

typedef struct {
    const char *path;
    unsigned char *bytes;
    size_t size, count;
    Stage *stages;
} Dump;

typedef struct {
    const char *path;
    const unsigned char *at, *end;
} Cursor;

static void fail(const char *path, const char *reason) {
    fprintf(stderr, "read_golden: %s %s.\n", path, reason);
    exit(2);
}

/* The header of a safetensors file is JSON of one kind: names, types, whole numbers. */

static unsigned char peek(Cursor *c) {
    while (c->at < c->end && strchr(" \t\r\n", *c->at)) c->at++;
    if (c->at == c->end || *c->at == 0) fail(c->path, "has a header that ends too early");
    return *c->at;
}

static int take(Cursor *c, char wanted) {
    if (peek(c) != (unsigned char)wanted) return 0;
    c->at++;
    return 1;
}

static void expect(Cursor *c, char wanted) {
    if (!take(c, wanted)) fail(c->path, "has a header that is none of safetensors");
}

static void text(Cursor *c, char *into, size_t room) {
    size_t length = 0;
    expect(c, '"');
    while (c->at < c->end && *c->at != '"') {
        if (*c->at == '\\' || length + 1 == room) fail(c->path, "has a name that is not plain");
        into[length++] = (char)*c->at++;
    }
    into[length] = 0;
    expect(c, '"');
}

static size_t number(Cursor *c) {
    size_t value = 0;
    if (peek(c) < '0' || peek(c) > '9') fail(c->path, "has no number where one should be");
    for (; c->at < c->end && *c->at >= '0' && *c->at <= '9'; c->at++) {
        if (value > SIZE_MAX / 16) fail(c->path, "has a number that is too large");
        value = value * 10 + (size_t)(*c->at - '0');
    }
    return value;
}

static void skip_notes(Cursor *c) {
    expect(c, '{');
    while (!take(c, '}')) {
        if (*c->at == '"')
            for (c->at++; c->at + 1 < c->end && *c->at != '"'; c->at++) c->at += *c->at == '\\';
        if (c->at < c->end) c->at++;
    }
}

static size_t width(const Stage *stage) {
    static const struct { const char *dtype; size_t bytes; } known[] = {
        {"F32", 4}, {"F64", 8}, {"I64", 8}, {"I32", 4}, {"U8", 1}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(stage->dtype, known[i].dtype)) return known[i].bytes;
    return 0;
}

static void read_stage(Cursor *c, Stage *stage, const Dump *dump) {
    size_t begin = 0, end = 0, room = (size_t)(dump->bytes + dump->size - c->end);
    char key[16];
    stage->count = 1;
    stage->dtype[0] = 0;
    expect(c, '{');
    do {
        text(c, key, sizeof key);
        expect(c, ':');
        if (!strcmp(key, "dtype")) {
            text(c, stage->dtype, sizeof stage->dtype);
        } else if (!strcmp(key, "shape")) {
            expect(c, '[');
            if (peek(c) != ']')
                do {
                    size_t side = number(c);
                    if (side && stage->count > dump->size / side) fail(c->path, "is cut off");
                    stage->count *= side;
                } while (take(c, ','));
            expect(c, ']');
        } else {
            expect(c, '[');
            begin = number(c);
            expect(c, ',');
            end = number(c);
            expect(c, ']');
        }
    } while (take(c, ','));
    expect(c, '}');
    if (!width(stage)) fail(c->path, "has numbers that are not F32, F64, I64, I32 or U8");
    if (begin > end || end > room || end - begin != stage->count * width(stage))
        fail(c->path, "is cut off or has a header of another file");
    stage->data = c->end + begin;
}

static Dump read_file(const char *path) {
    Dump dump = {path, NULL, 0, 0, NULL};
    size_t room = 1 << 16, got;
    FILE *file = fopen(path, "rb");
    if (!file) fail(path, "cannot be opened");
    do {
        unsigned char *more = realloc(dump.bytes, room *= 2);
        if (!more) fail(path, "does not fit into memory");
        dump.bytes = more;
        got = fread(dump.bytes + dump.size, 1, room - dump.size, file);
        dump.size += got;
    } while (got);
    if (ferror(file)) fail(path, "cannot be read");
    fclose(file);
    return dump;
}

static Dump read_safetensors(const char *path) {
    Dump dump = read_file(path);
    uint64_t header = 0;
    for (size_t i = 8; i-- && dump.size >= 8;) header = header << 8 | dump.bytes[i];
    if (dump.size < 8 || header > dump.size - 8) fail(path, "is no safetensors file");
    Cursor c = {path, dump.bytes + 8, dump.bytes + 8 + header};
    expect(&c, '{');
    if (take(&c, '}')) return dump;
    do {
        Stage *more = realloc(dump.stages, (dump.count + 1) * sizeof *more);
        if (!more) fail(path, "does not fit into memory");
        dump.stages = more;
        text(&c, dump.stages[dump.count].name, sizeof more->name);
        expect(&c, ':');
        if (!strcmp(dump.stages[dump.count].name, "__metadata__")) skip_notes(&c);
        else read_stage(&c, &dump.stages[dump.count++], &dump);
    } while (take(&c, ','));
    expect(&c, '}');
    return dump;
}

static Dump read_raw(const char *path, const char *name) {
    Dump dump = read_file(path);
    dump.stages = calloc(dump.count = 1, sizeof *dump.stages);
    if (!dump.stages) fail(path, "does not fit into memory");
    if (dump.size % 4) fail(path, "has a size that is no multiple of 4, expected raw float32");
    if (strlen(name) >= sizeof dump.stages->name) fail(name, "is no stage of the golden");
    strcpy(dump.stages->name, name);
    strcpy(dump.stages->dtype, "F32");
    dump.stages->count = dump.size / 4;
    dump.stages->data = dump.bytes;
    return dump;
}

static double value(const Stage *stage, size_t i) {
    const size_t bytes = width(stage);
    uint64_t bits = 0;
    for (size_t b = bytes; b--;) bits = bits << 8 | stage->data[i * bytes + b];
    if (stage->dtype[0] == 'F' && bytes == 8) {
        double wide;
        memcpy(&wide, &bits, 8);
        return wide;
    }
    if (stage->dtype[0] == 'F') {
        uint32_t low = (uint32_t)bits;
        float narrow;
        memcpy(&narrow, &low, 4);
        return narrow;
    }
    if (bytes == 4) return (double)(int32_t)(uint32_t)bits;
    return (double)(int64_t)bits;
}

/* Whether one stage is the same; says where not. Whole numbers have to be equal. */
static int same(const Stage *golden, const Stage *mine) {
    double size = 0;
    if (golden->count != mine->count) {
        printf("DIFFERENT: %s: expected %zu numbers, found %zu\n", golden->name, golden->count,
               mine->count);
        return 0;
    }
    for (size_t i = 0; i < golden->count; i++) size += value(golden, i) * value(golden, i);
    size = sqrt(size / (double)golden->count);
    for (size_t i = 0; i < golden->count; i++) {
        double expected = value(golden, i), found = value(mine, i);
        double most = golden->dtype[0] == 'F' ? LIMIT * size : 0;
        if (!(fabs(found - expected) <= most)) { /* so written, a nan differs */
            printf("DIFFERENT: %s at number %zu: expected %.9g, found %.9g, relative error %.3g\n",
                   golden->name, i, expected, found, fabs(found - expected) / size);
            return 0;
        }
    }
    return 1;
}

static void release(Dump *dump) {
    free(dump->bytes);
    free(dump->stages);
}

int main(int argc, char **argv) {
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: %s GOLDEN.safetensors [STAGE] MINE\n", argv[0]);
        return 2;
    }
    Dump golden = read_safetensors(argv[1]);
    Dump mine = argc == 3 ? read_safetensors(argv[2]) : read_raw(argv[3], argv[2]);
    size_t compared = 0;
    int equal = 1;
    for (size_t i = 0; i < golden.count && equal; i++)
        for (size_t j = 0; j < mine.count && equal; j++)
            if (!strcmp(golden.stages[i].name, mine.stages[j].name)) {
                equal = same(&golden.stages[i], &mine.stages[j]);
                compared++;
            }
    if (!compared) fail(mine.path, "has no stage of the golden");
    if (equal) printf("OK: %zu of the golden's %zu stages compared, all the same\n", compared, golden.count);
    release(&golden);
    release(&mine);
    return !equal;
}
