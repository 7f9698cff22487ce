"""Captions that are hard to tokenise: a list, and random ones with a fixed seed."""

import random

CHOSEN = """
A man says "hello" to the dog.
“Curly quotes” and ‘single ones’ around words
He said 'go' and left.
«Guillemets» and „low quotes“
``latex quotes'' in a caption
The girl's dress isn't the boys' favourite, they'd say.
It's a dog and he'll run, we're sure; I'm not, you've seen.
Don't can't won't shouldn't DON'T Cannot cannot gonna wanna gotta lemme gimme 'twas 'tis
y'all rock 'n' roll o'clock c'mon nor'easter Cap'n ol' somethin' 'em 'til 'cause the '90s and '99 fall
O'Malley d'Avignon l'eau c'est la vie
don’t it’s the dog’s toy
A well-known ice-cream stand, t-shirts and X-rays; a two-year-old child
dogs - playing -- in the snow --- and mud ---- here -----
an en dash – and an em dash — here
so\u00adft hyphen and a non\u2011breaking one
under_score and snake_case_words
2 dogs, 3.5 metres, 1,000 people, 12:30, -5 degrees, +3, .5, 1/2 cup, 1 1/2 cups, ½ ¼ ¾ ⅓ cup
10\u00a01/2 miles and 3-4 people
a 25-year-old in a No. 7 jersey, No.7, nos. 4 and 5, figs. 2, approx. 3
on 12/31/2014 or 31-12-14 at 5 p.m. or 5pm or 6 a.m.
1st 2nd 3rd 1980s 4x4 747s mp3 B-52
call 555-1234 or (415) 555-1234 or +1 415 555 1234 or 415.555.1234
$5 US$10 £20 €30 ¥40 5¢ ¤ #1 number # 2 C$5
a 50% sale & more, AT&T R&D S&P-500 Q&amp;A &lt;b&gt; &nbsp; &quot;x&quot; &mdash;
Mr. Smith, Mrs. Jones and Dr. No met St. Nick on Main St. in Washington D.C. in Jan. 2014.
The U.S. Army. U.S. The end. U.S.A. and U.K. people; e.g. this, i.e. that, etc. Etc.
He works at Acme Inc. The dog sleeps. Acme Co. ltd. Jr. and Sr. Ph.D. students
vitamin A. The end of plan B. A dog. Plan C.
An R.V. and a T.V. and an A.T.V.
Visit www.example.com or http://example.org/a_b?c=d#e, or example.net/path. Now!
mail a.person@example.com or <someone@example.org> now
follow @someone and #sunset #2 photos @ home
a photo IMG_1234.jpg and index.html, file.tar.gz. report.pdf!
c++ and C# and F# code
a smiley :) and :-( and ;-P =D :] :@ <3 (^_^) x_x
an emoji 😀 here 👩‍👩‍👧 and ❤️ and ☀ and ★ ♥ ♫ →
café naïve Zürich señor Ångström œuvre straße İstanbul ſtreet Kelvin Kelvin
Москва Αθήνα שלום سلام 東京 서울 ไทย हिन्दी
combining e\u0301 accents and n\u0303
Two men (one old) stand [here] {now} <there> </b> <br/> <a href="x y">link</a>
what?! no!! yes... well . . . hm…. ok?. really....
Wait.What is this,that;and:those?now!here
slashes and/or either/or/neither a/b-c 9/11 w/o \\\\ backslash
stars *** and \\* and ** bold **
tilde ~ caret ^ pipe | equals = == plus + under _ __ at @@ hash ##
no\u00a0break\u00a0space and thin\u2009space and wide\u3000space and zero\u200bwidth
tabs\tand  double   spaces
First sentence. Second one! Third? "Fourth." 'Fifth.' (Sixth.)
ALL CAPS CAPTION OF A DOG.
the end .
the end. .
a , b ; c : d ! e ? f
.
...
!!
''
-

a\x07bell and \x7f delete and \x1f unit
¿Qué? ¡Hola! §1 ©2014 ®™ °C 20°C 5° µm ×2 ÷ ±3 ² x² H₂O 10⁻³
10,000.50 1.2.3 1..2 1:2:3 1,2,3 3,4 ,5 .5. 5. 5.dog
a-b-c- -a- --a a--b pro-life anti-war ex-U.S. president non-U.S. U.S.-U.K. pact
-LRB- -rrb- (-) ( ) () (()) 
""".strip("\n").split("\n")

_CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyz" * 6
    + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 2
    + "0123456789" * 4
    + " " * 60
    + ".,'\"-!?;:()" * 8
    + "&/@#$%*+=<>[]{}_~^|`\\" * 2
    + "éèñüßçåøœÉÑÜ’‘“”–—…½°£€¢\u00a0\u00ad\u2009´«»™•×²\u0301жλ東א"
    + "😀❤★"
)
_PIECES = """
    a the dog man Woman 's n't 'll 're I'm U.S. e.g. p.m. Mr. St. No. Inc. D.C. www. .com .org .jpg http:// @ #
    &amp; &quot; -- ... :) ;-) 1/2 1,000 3.5 12:30 555-1234 $5 '90s two-year-old t-shirt can cannot gonna o'clock
    l' d' y' A The (see) <b> </i> Jan. Ave. vs. etc. A.B. x
"""


def random_captions(count: int = 20_000, seed: int = 0) -> list[str]:
    """Strings of 1 to 7 pieces: characters of captions, and words and marks that are hard to tokenise."""
    chance = random.Random(seed)
    pieces = _PIECES.split()

    def piece() -> str:
        kind = chance.random()
        if kind < 0.6:
            return "".join(_CHARACTERS[int(chance.random() * len(_CHARACTERS))] for _ in range(1 + int(chance.random() * 4)))
        return pieces[int(chance.random() * len(pieces))] + (" " if kind < 0.9 else "")

    return ["".join(piece() for _ in range(1 + int(chance.random() * 7))) for _ in range(count)]
