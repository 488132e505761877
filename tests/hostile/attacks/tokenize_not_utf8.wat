;; Tokenizes what is no UTF-8: a cut character, a surrogate, an overlong form. BAD_UTF8; returns how many were not.
(module
  (import "realm" "tokenize" (func $tokenize (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\e2\82\ed\a0\80\c0\af\ff")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $n i32)
    (if (i32.ne (call $tokenize (i32.const 0) (i32.const 2) (i32.const 0) (i32.const 64) (i32.const 8)) (i32.const -12)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (if (i32.ne (call $tokenize (i32.const 2) (i32.const 3) (i32.const 0) (i32.const 64) (i32.const 8)) (i32.const -12)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (if (i32.ne (call $tokenize (i32.const 5) (i32.const 2) (i32.const 0) (i32.const 64) (i32.const 8)) (i32.const -12)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (if (i32.ne (call $tokenize (i32.const 7) (i32.const 1) (i32.const 0) (i32.const 64) (i32.const 8)) (i32.const -12)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (local.get $n)))
