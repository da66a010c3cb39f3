"""How refusals are worded, by language: regular expressions that `refusal` looks for in one sentence."""

from __future__ import annotations

from typing import NamedTuple


class Phrases(NamedTuple):
    """The words of one language.

    Attributes:
      cannot: the writer says that it cannot or will not.
      serve: what only a refusal declines: to help, to comply.
      deed: what declines a request only with a `thing`: to write, to give.
      thing: what a request asks for: this text, information, advice.
      model: the writer speaks of itself as a model, or of its rules.
      has_word_starts: the patterns begin at the start of a word. False where words are not parted by
        spaces, or are written together with what precedes them.
    """

    cannot: str
    serve: str
    deed: str
    thing: str
    model: str
    has_word_starts: bool = True


PHRASES = {
    "English": Phrases(
        # Not "I cannot thank you enough", which praises.
        cannot=r"i (?:(?:really|simply|just) )?(?:(?:can't|cannot|can not)(?! (?:\w+ ){1,2}enough\b)"
        r"|won't|will not"
        r"|must (?:\w+ )?(?:decline|refuse)|have to (?:decline|refuse)|decline to|do(?: not"
        r"|n't) feel comfortable|do(?: not|n't) have (?:any |my own |the )?(?:access|ability"
        r"|personal|real-time|physical|opinion|feeling|belief|emotion|memor|experience"
        r"|preference|data|information|means)\w*)\b|i(?:'m| am) (?:going to have to decline|unable"
        r"|not (?:able|allowed|permitted|going|comfortable|programmed|designed))\b",
        serve=r"help(?:ing)?(?= (?:you )?(?:with|in)\b| you\b| further\b| here\b| on (?:this"
        r"|that)\b|[.,!;:]|$)|assist|comply|fulfil|accommodate|(?:decline|refuse) to"
        r"|(?:do (?:that|this)|continue)(?=[.,!;:]|$)|engage (?:in|with)|proceed with|respond\b"
        r"|answer\b(?! (?:the|my|your) (?:door|phone|call))",
        deed=r"answer|complete|process|provide|respond|support|write|generate|create|discuss|give"
        r"|share|produce|reproduce|offer|perform|decline|refuse|retrieve|access|draw|design"
        r"|display|execute|continue|verify|translate|estimate|calculate|determine|reveal"
        r"|disclose|explain",
        thing=r"this\b|that\b|your\b|such\b|request|question|information|instruction|content"
        r"|text\b|advice|lyrics|opinion|detail|guidance|topic|message|conversation|task"
        r"|prompt\b|code\b|file\b|image|picture|for you\b|data\b",
        model=r"as an? (?:\S+ ){0,3}?(?:ai|artificial intelligence|language model|chatbot"
        r"|(?:virtual|ai) assistant)\b|my (?:\w+ )?(?:guidelines|programming|polic(?:y|ies)"
        r"|principles|training)\b|i(?:'m| am) (?:just |only )?an? (?:ai"
        r"|(?:large )?language model)\b",
    ),
    "German": Phrases(
        cannot=r"(?:ich (?:kann|darf|werde)|(?:kann|darf|werde) ich)\b.{0,90}?\b(?:nicht|kein\w*)\b"
        r"|(?:ich bin|bin ich) (?:\w+ )?nicht (?:in der lage|befugt|berechtigt)|(?:ich muss"
        r"|muss ich)\b.{0,60}ablehnen",
        serve=r"helfen|weiterhelfen|behilflich|unterstützen|nachkommen|ablehnen"
        r"|das kann ich (?:leider )?nicht(?: tun| machen)?(?=[.,!;]|$)|antworten|beantworten",
        deed=r"eingehen|bearbeiten|erfüllen|erstellen|schreiben|verfassen|geben|bereitstellen"
        r"|liefern|generieren|ausführen|nennen|äußern|wiedergeben|erteilen|teilen|besprechen"
        r"|diskutieren|fortsetzen|übersetzen|öffnen|offenlegen|erklären",
        thing=r"dies\w*|solche\w*|derartige\w*|darauf|dazu|anfrage|bitte\b|wunsch|frage"
        r"|information|auskunft|auskünfte|anleitung|anweisung|inhalt|text|liedtext|ratschl"
        r"|rat\b|meinung|thema|nachricht|antwort\b|gespräch|aufgabe|code\b|datei",
        model=r"als (?:\S+ ){0,2}?(?:ki\b|ki-|künstliche intelligenz|\w*sprachmodell|assistent"
        r"|chatbot)|meine[nr]? (?:richtlinien|programmierung|vorgaben|grundsätze)",
    ),
    "French": Phrases(
        cannot=r"je ne (?:peux|pourrai|saurais|suis (?:\w+ )?pas (?:en mesure|autorisé|capable))"
        r"|je (?:dois|préfère) (?:refuser|décliner)|il m'est impossible"
        r"|je regrette de ne pas pouvoir|je suis (?:\S+ )?dans l'(?:incapacité"
        r"|impossibilité)",
        serve=r"(?:[mtv]'|vous )?aider|assister|accéder à (?:cette|votre)|satisfaire|donner suite"
        r"|faire (?:cela|ça)|refuser|décliner|répondre(?! au téléphone)",
        deed=r"répondre|fournir|écrire|rédiger|donner|traiter|créer|générer|produire|reproduire"
        r"|partager|réaliser|exécuter|proposer|exprimer|discuter|aborder|continuer"
        r"|poursuivre|traduire|accéder|divulguer|révéler|expliquer",
        thing=r"cette|ce (?:genre|type|texte|contenu|sujet)|ces\b|cela|y (?:répondre)|votre"
        r"|demande|question|information|instruction|conseil|paroles|chanson|avis\b|opinion"
        r"|sujet|message|conversation|tâche|code\b|fichier",
        model=r"en tant qu(?:e |')(?:\S+ ){0,2}?(?:modèle|ia\b|intelligence artificielle"
        r"|assistant)|mes (?:règles|directives|principes|consignes|lignes directrices)"
        r"|ma programmation",
    ),
    "Spanish": Phrases(
        cannot=r"no (?:puedo|podré|podría|me es posible|estoy (?:autorizad|en condiciones"
        r"|programad)|soy capaz)|(?:lamento|siento) (?:mucho )?no poder|(?:debo"
        r"|tengo que) (?:rechazar|declinar)|me niego",
        serve=r"ayudar|asistir(?:te|le|los?)\b|cumplir con|satisfacer|hacer eso|rechazar|declinar"
        r"|(?:responder|contestar)(?! (?:el|al) teléfono)",
        deed=r"responder|contestar|proporcionar|generar|crear|escribir|dar(?:te|les|os)?\b"
        r"|ofrecer|completar|realizar|procesar|compartir|reproducir|atender|brindar|expresar"
        r"|hablar|discutir|continuar|ejecutar|acceder|traducir|analizar|revelar|divulgar"
        r"|explicar",
        thing=r"es[aeo]s?\b|est[aeo]s?\b|tu (?:solicitud|petición)|su (?:solicitud|petición)"
        r"|solicitud|petición|pregunta|informaci|instrucci|contenido|texto|letra|consejo"
        r"|opini|tema|mensaje|conversación|tarea|código|archivo",
        model=r"como (?:una? )?(?:modelo|ia\b|inteligencia artificial|asistente)|mis (?:normas"
        r"|directrices|pautas|políticas|principios)|mi programación",
    ),
    "Portuguese": Phrases(
        cannot=r"não (?:posso|consigo|poderei|estou autorizad|tenho (?:permissão|autorização)"
        r"|sou capaz|me é possível)|lamento não poder|(?:preciso|devo|tenho (?:de"
        r"|que)) recusar",
        serve=r"ajud|auxili|atender (?:a )?(?:ess|est|seu|sua)|cumprir|satisfazer|fazer isso"
        r"|recusar|responder(?! (?:ao|o) telefone)",
        deed=r"respond|fornec|escrev|cri(?:ar|á)|ger(?:ar|á)|dar\b|oferecer|complet|realizar"
        r"|process|compartilhar|partilhar|reproduz|expressar|falar|discutir|continuar"
        r"|executar|acessar|traduzir|revelar|divulgar|explicar",
        thing=r"ess[ae]s?\b|est[ae]s?\b|ist?o\b|isso|disso|pedido|solicitaç|pergunta|informaç"
        r"|instruç|conteúdo|texto|letra|conselho|opini|tema|assunto|mensagem|conversa|tarefa"
        r"|código|arquivo|ficheiro|dados|minhas instruç",
        model=r"como (?:uma? )?(?:modelo|ia\b|inteligência artificial|assistente)"
        r"|minhas (?:diretrizes|normas|regras|políticas)|minha programação",
    ),
    "Italian": Phrases(
        cannot=r"non (?:posso|potrò|sono in grado|sono autorizzat|riesco|mi è possibile)"
        r"|devo (?:rifiutare|declinare)",
        serve=r"aiutar|assister(?:ti|la|vi)|soddisfa|esaudire|far(?:lo|e questo)(?=[.,!;]|$)"
        r"|rifiutare|declinare|risponder(?!e al telefono)",
        deed=r"risponder|fornir|scriver|dar(?:e|ti|le|vi)\b|crear|generar|elaborar|esprimer"
        r"|eseguir|completar|condivider|riprodur|produrr|continuar|discuter|parlar|acceder"
        r"|tradur|rivelar|divulgar|spiegar",
        thing=r"quest|quel|tal[ei]\b|richiest|domand|informazion|istruzion|contenut|testo|consigl"
        r"|opinion|parer|argoment|messagg|conversazion|compit|codice|file\b",
        model=r"(?:in quanto|come) (?:un[ao]? |un')?(?:modello|ia\b|intelligenza artificiale"
        r"|assistente)|mie (?:linee guida|regole|direttive|politiche)|mia programmazione",
    ),
    "Dutch": Phrases(
        cannot=r"(?:ik (?:kan|mag)|(?:kan|mag) ik)\b.{0,80}?\b(?:niet|geen)\b|(?:ik ben"
        r"|ben ik) (?:\w+ )?niet in staat|(?:ik moet|moet ik)\b.{0,60}(?:weigeren|afwijzen)",
        serve=r"helpen|assisteren|voldoen|van dienst|weigeren|afwijzen|beantwoorden|antwoorden",
        deed=r"uitvoeren|schrijven|geven|verstrekken|maken|genereren|verwerken|leveren|delen"
        r"|bespreken|voortzetten|openen|vertalen|onthullen|uitleggen",
        thing=r"di[te]\b|deze|zulke|dergelijke|verzoek|vraag|informatie|instructie|inhoud|tekst"
        r"|songtekst|advies|mening|daarover|onderwerp|bericht|gesprek|taak|code\b|bestand",
        model=r"als (?:\S+ ){0,2}?(?:ai\b|ai-|taalmodel|chatbot|assistent"
        r"|kunstmatige intelligentie)|mijn (?:richtlijnen|regels|beleid|programmering)",
    ),
    "Swedish, Danish, Norwegian": Phrases(
        cannot=r"(?:jag kan|kan jag|jeg kan|kan jeg)\b.{0,60}?\b(?:inte|ikke)\b|(?:jag måste"
        r"|jeg må) (?:avböja|avslå|afslå)",
        serve=r"hjälpa|hjelpe|hjælpe|bistå|avböja|avslå|afslå|svara|svare|besvara|besvare",
        deed=r"ge\b|gi\b|give\b|skriva|skrive|skapa|lage\b|lave\b|utföra|utføre|udføre"
        r"|tillhandahålla|dela\b|dele\b",
        thing=r"den här|det här|denn[ae]|detta|dette|den (?:informationen|frågan)|sådan|slik"
        r"|förfrågan|begäran|forespørsel|fråga|spørsmål|spørgsmål|information|informasjon"
        r"|instruktion|instruks|råd\b|text|tekst|innehåll|indhold|åsikt|ämne|emne|meddelande"
        r"|besked|samtal|uppgift|oppgave|opgave",
        model=r"som (?:en |ett |et )?(?:\S+ )?(?:ai\b|ai-|språkmodel|sprogmodel|assistent)|(?:mina"
        r"|mine) (?:riktlinjer|retningslinjer|regler)",
    ),
    "Polish": Phrases(
        cannot=r"nie (?:mogę|będę w stanie|jestem w stanie|wolno mi|potrafię)|muszę odmówić"
        r"|odmawiam",
        serve=r"pomóc|pomagać|spełnić|odmówić|zrealizować|odpowiedzieć|odpowiadać",
        deed=r"podać|udziel|napisać|stworzyć|tworzyć|wygenerować|dostarczyć|wykonać|udostępnić"
        r"|przedstawić|wyrazić|omawiać|rozmawiać|kontynuować|przetłumaczyć|ujawnić|wyjaśnić",
        thing=r"tego\b|tej\b|tę\b|to\b|tych\b|taki|prośb|pytani|informacj|instrukcj|treści|tekst"
        r"|porad|opini|temat|wiadomoś|rozmow|zadani|kod\b|kodu\b",
        model=r"jako (?:\S+ )?(?:model|ai\b|asystent|sztuczna inteligencja)|mo(?:imi|ich"
        r"|je) (?:zasad|wytyczn)",
    ),
    "Czech": Phrases(
        cannot=r"nemohu|nemůžu|nejsem schop|musím odmítnout",
        serve=r"pomoci|pomoct|vyhovět|odmítnout|odpovědět|odpovídat",
        deed=r"poskytnout|napsat|vytvořit|dát\b|splnit|sdílet|pokračovat|přeložit|mluvit",
        thing=r"tuto|tento|toto|tyto|to\b|takov|žádost|otázk|informac|pokyn|obsah|text|rady?\b"
        r"|názor|téma|tématu|zpráv|rozhovor|úkol",
        model=r"jako (?:\S+ )?(?:model|umělá inteligence|asistent)|m(?:ými|é|ým) (?:zásad|pravidl"
        r"|pokyn)",
    ),
    "Russian": Phrases(
        cannot=r"не (?:могу|смогу|в состоянии|вправе)|(?:вынужден|должен|должна)\w* отказать",
        serve=r"помочь|помогать|отказать|(?:ответить|отвечать)(?! на (?:звон|телефон))",
        deed=r"ответить|отвечать|выполнить|предостав|да(?:ть|вать)\b|написать|писать|создать"
        r"|создавать|сгенерировать|обработать|обсуждать|воспроизвести|поделиться|привести"
        r"|высказ|продолж|перевести|говорить|раскры|объяснить|определить",
        thing=r"эт(?:о|от|ого|ому|у|и|их|ой|ом|им)\b|так(?:ой|ую|ие|ое)\b|ваш|запрос|вопрос|просьб"
        r"|информаци|инструкци|содержани|контент|текст|совет|мнени|тем[уеы]\b|сообщени"
        r"|разговор|задани|задач|код\b|файл",
        model=r"как (?:\S+ )?(?:языковая модель|модель|ии\b|искусственный интеллект|ассистент)"
        r"|мо(?:им|и|их|ими) (?:правил|принцип|рекомендаци|инструкци)",
    ),
    "Ukrainian": Phrases(
        cannot=r"не (?:можу|зможу|в змозі|маю права)|(?:мушу|змушен\w*) відмов",
        serve=r"допомогти|допомагати|відмов|(?:відповісти|відповідати)(?! на (?:дзвін|телефон))",
        deed=r"відповісти|відповідати|виконати|надати|надавати|да(?:ти|вати)\b|написати|писати"
        r"|створити|згенерувати|обговорювати|відтворити|поділитися|продовж|перекласти"
        r"|говорити|розкри|пояснити",
        thing=r"ц(?:е|ей|ього|ьому|ю|і|их)\b|так(?:ий|у|их|е)\b|ваш|запит|питання|прохання"
        r"|інформаці|інструкці|зміст|вміст|текст|порад|думк|тем[уи]\b|повідомлен|розмов"
        r"|завдан|код\b",
        model=r"як (?:\S+ )?(?:мовна модель|модель|ші\b|штучний інтелект|асистент)|мо(?:їм|ї|їх"
        r"|їми) (?:правил|принцип)",
    ),
    "Turkish": Phrases(
        cannot=r"\w+[ae]m[ae]m\b|\w+[ae]m[ıi]yorum\b|\w+[ae]m[ae]y[ae]c[ae]ğ[ıi]m\b"
        r"|reddetmek zorundayım",
        serve=r"yardımcı ol|yardım ed|yerine getir|karşılay|destek ol|reddetmek|cevap ver|cevapla"
        r"|yanıt ver|yanıtla",
        deed=r"cevap|yanıt|sağla|sun[au]|oluştur|yaz[a]|üret|ver[e]|paylaş|bildir|devam|tartış"
        r"|konuş|çevir|eriş",
        thing=r"bu\b|bun[ua]\b|böyle|isteğ|istek|taleb|talep|soru|bilgi|içeri|metn|metin|tavsiye"
        r"|görüş|talimat|şarkı söz|konu\b|konuda|mesaj|sohbet|görev|kod\b",
        model=r"(?:yapay zek[aâ]|(?:dil )?model|asistan)\w* olarak|(?:kural|yönerge|ilke"
        r"|politika)lar[ıi]?m[ae]",
    ),
    "Indonesian, Malay": Phrases(
        cannot=r"(?:saya|aku|kami) (?:tidak|tak) (?:bisa|dapat|mampu|boleh|diizinkan)|(?:saya"
        r"|kami) (?:harus|terpaksa) menolak",
        serve=r"membantu|bantu\b|menolak|memenuhi|menjawab|merespons|menanggapi",
        deed=r"member|menyediakan|menulis|membuat|menghasilkan|membagikan|memproses|menyampaikan"
        r"|melakukan|membahas|membincangkan|melanjutkan|meneruskan|menerjemahkan|mengakses"
        r"|mengungkapkan|menjelaskan",
        thing=r"ini\b|itu\b|tersebut|seperti itu|permintaan|pertanyaan|soalan|informasi|maklumat"
        r"|instruksi|arahan|konten|kandungan|teks|lirik|nasihat|saran|pendapat|topik|pesan"
        r"|percakapan|perbualan|tugas|kode|jawaban|jawapan|data\b",
        model=r"sebagai (?:sebuah )?(?:model|ai\b|asisten|kecerdasan buatan)|(?:pedoman|kebijakan"
        r"|aturan|panduan) saya",
    ),
    "Vietnamese": Phrases(
        cannot=r"(?:tôi|mình|chúng tôi) (?:\w+ ){0,2}?(?:không thể|không được phép"
        r"|không có khả năng|phải từ chối)",
        serve=r"giúp|hỗ trợ|đáp ứng|từ chối|trả lời|phản hồi",
        deed=r"cung cấp|thực hiện|viết|tạo\b|đưa\b|đưa ra|chia sẻ|thảo luận|xử lý|bàn\b|nói\b"
        r"|tiếp tục|dịch\b|truy cập|tiết lộ|giải thích|xác định",
        thing=r"này\b|đó\b|như vậy|yêu cầu|câu hỏi|thông tin|hướng dẫn|nội dung|văn bản"
        r"|lời bài hát|lời khuyên|ý kiến|quan điểm|chủ đề|vấn đề|tin nhắn|cuộc trò chuyện"
        r"|nhiệm vụ|mã\b|phản hồi",
        model=r"(?:là|với tư cách) (?:là )?(?:một )?(?:mô hình|ai\b|trợ lý|trí tuệ nhân tạo)"
        r"|(?:nguyên tắc|chính sách|quy định) của (?:tôi|mình)",
    ),
    "Chinese": Phrases(
        cannot=r"(?:我|抱歉|对不起|對不起|遗憾|遺憾)[^。]{0,10}?(?:无法|無法|不能|不可以|没有?办法"
        r"|沒有?辦法|不便|必须拒绝|必須拒絕|恕难|恕難)",
        serve=r"回答|回复|回覆|帮[助你您忙上]|幫[助你您忙上]|协助|協助|满足|滿足|从命|從命|拒绝"
        r"|拒絕",
        deed=r"提供|完成|处理|處理|讨论|討論|生成|执行|執行|继续|繼續|撰写|撰寫|[写寫给給]|谈论"
        r"|談論|访问|翻译|翻譯|泄露|透露",
        thing=r"[这這该該此您]|请求|請求|要求|问题|問題|信息|資訊|内容|內容|建议|建議|歌词|歌詞"
        r"|全文|指导|意见|意見|看法|话题|話題|消息|对话|對話|任务|任務|代码",
        model=r"(?:作为|作為|身为|身為)[^,。]{0,8}(?:人工智能|人工智慧|AI|语言模型|語言模型|助手)"
        r"|(?:我的|违反|違反)[^,。]{0,8}(?:准则|準則|政策|原则|原則|规定|規定|指南)",
        has_word_starts=False,
    ),
    "Japanese": Phrases(
        cannot=r"でき(?:ません(?!でした)|かねます|ない)|出来(?:ません(?!でした)|ない)|(?:いた"
        r"|致)しかねます|お力になれません|お断り",
        serve=r"お答え|お手伝い|お応え|応じ|お力に|お断り|ご要望|ご依頼|リクエスト|ご質問|承知",
        deed=r"対応|回答|提供|支援|サポート|作成|生成|書く|教え|答え|掲載|共有|示す|続け|翻訳"
        r"|アクセス|お話",
        thing=r"その|この|質問|依頼|内容|情報|助言|アドバイス|歌詞|全文|テキスト|手順|意見|要求"
        r"|話題|メッセージ|会話|タスク|コード",
        model=r"(?:AI|人工知能|言語モデル|アシスタント)(?:として|です|である|なので)"
        r"|私の(?:ガイドライン|方針|規約|ポリシー)|(?:ガイドライン|規約|ポリシー)に(?:反"
        r"|違反|より)",
        has_word_starts=False,
    ),
    "Korean": Phrases(
        cannot=r"수(?:는|가)? 없(?!게|었)|못합니다|못해요|어렵습니다|어려워요|불가능합니다"
        r"|거절(?:합니다|하겠|할 수밖에)",
        serve=r"도와|도움|응할|응해|거절(?:합니다|하겠|할 수밖에)|답변|대답|응답",
        deed=r"제공|수행|지원|작성|알려|드릴|드리기|생성|말씀|논의|계속|번역|이야기",
        thing=r"요청|질문|정보|조언|내용|가사|그런|그러한|이러한|이런|의견|텍스트|방법|주제|메시지"
        r"|대화|작업|코드",
        model=r"(?:AI|인공지능|모델|어시스턴트)(?:로서|이기|이므로|이라)|(?:제|저의) (?:가이드라인"
        r"|지침|정책|원칙)",
        has_word_starts=False,
    ),
    "Arabic": Phrases(
        cannot=r"لا (?:أستطيع|يمكنني|أقدر|أتمكن|يسعني)|لن (?:أتمكن|أستطيع)|(?:لست|غير) قادر"
        r"|لا يُ?سمح لي|يجب أن أرفض",
        serve=r"مساعد|أساعد|تلبية|أرفض|الإجابة|أجيب|الرد على",
        deed=r"إجابة|تقديم|أقدم|كتابة|كتابت|أكتب|إعطاء|توفير|إنشاء|الرد|مشاركة|تنفيذ|إبداء|مناقشة"
        r"|متابعة|ترجمة|الوصول",
        thing=r"هذا|هذه|ذلك|تلك|طلب|سؤال|معلومات|تعليمات|محتوى|نصائح|نصيحة|النص|كلمات|رأي|موضوع"
        r"|رسالت|محادثة|مهمة",
        model=r"(?:بصفتي|باعتباري|كوني)|كنموذج|إرشاداتي|سياساتي|سياستي|قواعدي|مبادئي",
        has_word_starts=False,
    ),
    "Hindi": Phrases(
        cannot=r"(?:मैं|हम|क्षमा|माफ़|खेद)[^।]*(?:नहीं (?:\S+ )?(?:सकत|पाऊ)|असमर्थ)"
        r"|मना करना (?:होगा|पड़ेगा)",
        serve=r"मदद|सहायता|मना कर|जवाब|उत्तर",
        deed=r"दे |लिख|बता|प्रदान|बना |साझा|चर्चा|जारी|अनुवाद",
        thing=r"इस |इसक|ऐस[ीे]|यह |अनुरोध|सवाल|प्रश्न|जानकारी|निर्देश|सामग्री|सलाह|गीत|पाठ|राय"
        r"|विषय|संदेश|बातचीत|कार्य",
        model=r"(?:मॉडल|एआई|AI|सहायक) (?:के रूप में|होने के नाते)|(?:मेरे|अपने) (?:दिशानिर्देश"
        r"|दिशा-निर्देश|नियम|सिद्धांत)",
        has_word_starts=False,
    ),
    "Romanian": Phrases(
        cannot=r"nu (?:pot|voi putea|sunt (?:capabil|autorizat|în măsură))|trebuie să refuz",
        serve=r"(?:să )?(?:te |vă )?ajut|răspund|îndeplin|refuz",
        deed=r"ofer|furniz|scriu|scrie|cre(?:ez|a)|gener|discut|continu|traduc",
        thing=r"acest|acea|astfel|cerer|solicitar|întrebar|informați|instrucțiuni|conținut|text"
        r"|sfat|opini|subiect",
        model=r"ca (?:un )?(?:model|asistent|ai\b|inteligență artificială)|(?:regulile|politicile"
        r"|principiile) mele",
    ),
    "Hungarian": Phrases(
        cannot=r"nem (?:tudok|tudom|tudhatok|áll módomban|vagyok képes)|vissza kell utasítanom",
        serve=r"segíteni|segíthetek|válaszolni|teljesíteni|eleget tenni|visszautasít",
        deed=r"adni|nyújtani|írni|megírni|készíteni|létrehozni|beszélni|folytatni|lefordítani",
        thing=r"ez\b|ezt\b|erre|ebben|ilyen|kérés|kérdés|információ|utasítás|tartalm|szöveg|tanács"
        r"|vélemény|tém",
        model=r"(?:nyelvi modell|asszisztens|mesterséges intelligencia|ai)\w*-?(?:ként|ként\b)"
        r"|(?:irányelv|szabály|elv)eim",
    ),
    "Greek": Phrases(
        cannot=r"δεν (?:μπορώ|θα μπορέσω|είμαι σε θέση|επιτρέπεται)|πρέπει να αρνηθώ",
        serve=r"βοηθήσω|απαντήσω|ικανοποιήσω|εξυπηρετήσω|αρνηθώ",
        deed=r"δώσω|παρέχω|παράσχω|γράψω|δημιουργήσω|συζητήσω|συνεχίσω|μεταφράσω",
        thing=r"αυτ[όήέάούς]|τέτοι|αίτημα|ερώτηση|πληροφορί|οδηγί|περιεχόμενο|κείμενο|συμβουλ"
        r"|γνώμη|θέμα",
        model=r"ως (?:\S+ )?(?:γλωσσικό μοντέλο|μοντέλο|βοηθός|τεχνητή νοημοσύνη)|(?:οδηγίες|αρχές"
        r"|κανόνες) μου",
    ),
    "Finnish": Phrases(
        cannot=r"en (?:voi|pysty|saa|kykene)|minun (?:on|täytyy) kieltäyty",
        serve=r"auttaa|vastata|kieltäyty|toteuttaa",
        deed=r"antaa|tarjota|kirjoittaa|luoda|tuottaa|keskustella|jatkaa|kääntää",
        thing=r"tä(?:tä|hän|ssä|män)\b|tällai|sellai|pyyntö|pyynn|kysymyk|tieto|ohjei|sisältö"
        r"|teksti|neuvo|mielipi|aihe",
        model=r"(?:tekoäly|kielimalli|avustaja)\w*na\b|(?:ohjeideni|sääntöjeni|periaatteideni)",
    ),
    "Thai": Phrases(
        cannot=r"ไม่สามารถ|ไม่อาจ|ขอปฏิเสธ",
        serve=r"ช่วย|ตอบ|ปฏิเสธ",
        deed=r"ให้|เขียน|สร้าง|ดำเนินการ|แปล|พูดคุย|แบ่งปัน",
        thing=r"นี้|นั้น|คำขอ|คำถาม|ข้อมูล|คำแนะนำ|เนื้อหา|ข้อความ|ความคิดเห็น|หัวข้อ",
        model=r"ในฐานะ(?:โมเดล|แบบจำลอง|ผู้ช่วย|ปัญญาประดิษฐ์|AI)|(?:แนวทาง|นโยบาย"
        r"|หลักการ)ของ(?:ฉัน|ผม|ดิฉัน)",
        has_word_starts=False,
    ),
    "Persian": Phrases(
        cannot=r"نمی\s?‌?\s?(?:توانم|تونم)|نمی‌توانم|قادر نیستم|مجاز نیستم|باید رد کنم",
        serve=r"کمک|پاسخ|جواب|یاری",
        deed=r"ارائه|بنویس|نوشتن|ایجاد|تولید|بدهم|ترجمه|بحث|ادامه",
        thing=r"این|آن|چنین|درخواست|سوال|سؤال|پرسش|اطلاعات|دستور|محتوا|متن|توصیه|نظر|موضوع",
        model=r"به عنوان (?:یک )?(?:مدل|دستیار|هوش مصنوعی)|(?:دستورالعمل|قوانین|اصول"
        r"|سیاست)\S* (?:من|خودم)",
        has_word_starts=False,
    ),
    "Hebrew": Phrases(
        cannot=r"(?:אני )?(?:לא יכול|לא אוכל|איני יכול|אינני יכול|לא מסוגל)|עליי לסרב",
        serve=r"לעזור|לסייע|לענות|להשיב|לסרב",
        deed=r"לספק|לתת|לכתוב|ליצור|לבצע|לדון|להמשיך|לתרגם|לשתף",
        thing=r"זה|זו|זאת|כזה|כזו|בקשה|בקשת|שאלה|מידע|הוראות|תוכן|טקסט|עצה|עצות|דעה|נושא",
        model=r"כמודל|כבינה מלאכותית|כעוזר|(?:הנחיות|ההנחיות|הכללים|העקרונות) שלי",
        has_word_starts=False,
    ),
}
